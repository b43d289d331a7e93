"""VMCALL, which the guest's monitor answers: KVM's hypercalls that do nothing.

KVM's contract (Documentation/virt/kvm/x86/hypercalls.rst): RAX is the number, and the result; above CPL 0
it is -EPERM, and of a number that does not exist -ENOSYS. Outside 64-bit mode both have 32 bits.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome, code_address
from emufuzz.case.paths import EXIT_PATH
from emufuzz.oracle.exits.run import Run
from emufuzz.oracle.native_view import check_judged, kvm_of
from emufuzz.oracle.operands import place_of

VMCALL: Final = b"\x0f\x01\xc1"
_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_POLL: Final = 1
#: Numbers that do something if the guest has the feature: kick, clock, IPIs, yield, map.
_FEATURES: Final = frozenset((5, 9, 10, 11, 12))
_EPERM: Final = -1
_ENOSYS: Final = -1000
#: A guest of Hyper-V's has other hypercalls.
_HYPERV: Final = "hyperv"


def is_hypercall(case: Case) -> bool:
    """VMCALL that exits by itself."""
    return case.path == EXIT_PATH and case.code.startswith(VMCALL)


def hypercall(run: Run) -> Outcome:
    """RAX is the result.

    Raises:
        UnsupportedCaseError: It is one that depends on the guest's features.
    """
    case = run.case
    check_judged(case)
    if kvm_of(case).get("knobs", {}).get(_HYPERV) or case.count != 1:
        raise UnsupportedCaseError("kvm.knobs.hyperv: hypercalls may be Hyper-V's")
    if any(place_of(case, code_address(case) + i & _MASK64) is None for i in (0, len(VMCALL) - 1)):
        raise UnsupportedCaseError("code: it cannot be fetched, so that the exit cannot come from it")
    long = case.mode == "prot64"
    number = case.gpr[VCPU_REGS_RAX] & (_MASK64 if long else _MASK32)
    result = 0 if number == _POLL else _ENOSYS
    if case.mode != "real" and (case.mode == "vm86" or case.system.seg[VCPU_SREG_SS].dpl):
        result = _EPERM
    elif number in _FEATURES:
        raise UnsupportedCaseError("code: it is a hypercall that a feature decides about")
    run.gpr[VCPU_REGS_RAX] = result & (_MASK64 if long else _MASK32)
    run.rip = run.rip + len(VMCALL) & (_MASK64 if long else _MASK32)
    run.rflags &= ~X86_EFLAGS_RF
    return run.outcome()
