"""What L1 intercepts of an instruction that KVM emulates for L2.

KVM: emulator_intercept, vmx_check_intercept, vmx_check_intercept_io. SDM Vol. 3C 25.1.3
"Instructions That Cause VM Exits Conditionally".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.x86emul import (
    REPE_PREFIX,
    X86EMUL_CONTINUE,
    X86EMUL_PROPAGATE_FAULT,
    X86EMUL_UNHANDLEABLE,
)
from emufuzz.kvm.vcpu import GuestMode

_PORTS: Final = frozenset({"in", "ins", "out", "outs"})
_TABLES: Final = frozenset({"lgdt", "lidt", "lldt", "ltr", "sgdt", "sidt", "sldt", "str"})


def vmx_check_intercept(ctxt: X86EmulateCtxt, nested: GuestMode) -> int:
    """Ask L1's controls (names in `GuestMode.intercepts`) about the decoded instruction.

    The stage does not matter: VMX decides the same at each.

    KVM deviation: an exit to L1 is not made; the instruction is unhandleable, as is any intercepted
    one that is not listed here whether L1 wants it or not. PAUSE is looked up among the secondary
    controls with the number of a primary one, which there is bus-lock detection (SDM Vol. 3C 24.6.2).
    """
    opcode = ctxt.opcode
    what = opcode.intercept if opcode is not None else ""
    wanted = nested.intercepts
    if what == "rdpid":
        if "rdtscp" in wanted:
            return X86EMUL_UNHANDLEABLE
        ctxt.exception.vector = UD_VECTOR
        ctxt.exception.error_code_valid = False
        return X86EMUL_PROPAGATE_FAULT
    if what in _PORTS:
        intercepted = "io" in wanted
    elif what in _TABLES:
        intercepted = "desc" in wanted
    elif what == "pause":
        intercepted = ctxt.rep_prefix == REPE_PREFIX and "bus_lock_detection" in wanted
    else:
        intercepted = True
    return X86EMUL_UNHANDLEABLE if intercepted else X86EMUL_CONTINUE
