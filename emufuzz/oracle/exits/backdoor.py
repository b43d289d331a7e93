"""#GP exits of a guest with VMware's backdoor: of what is no access to a port the #GP is the guest's own.

Accesses to ports are judged by those who run them (emufuzz.oracle.native_view).
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome
from emufuzz.oracle.exits.run import NoExitError, Run
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import is_port_access

_COUNTERS: Final = range(0x10000, 0x10003)


def backdoor(run: Run) -> Outcome:
    """#GP(0), as the exit reports it.

    Raises:
        NoExitError: There is no instruction, or it is undefined.
        UnsupportedCaseError: An event is queued, too, or it is an access to a port.
    """
    for field in ("pending", "vectoring_info"):
        if run.kvm.get(field):
            raise UnsupportedCaseError(f"kvm.{field}: an event is delivered first")
    if is_port_access(run.case):
        raise UnsupportedCaseError("code: it is an access to a port, which other oracles run")
    if b"\x0f\x33" in run.case.code[:15] and run.gpr[VCPU_REGS_RCX] & 0xFFFFFFFF in _COUNTERS:
        raise UnsupportedCaseError("code: it is RDPMC of a counter of the backdoor's")
    instruction = CaseInstruction(run.case).strict
    if not instruction.code:
        raise NoExitError("code: an undefined instruction is #UD")
    if instruction.len > len(run.case.code):
        raise NoExitError("code: without a whole instruction another exception comes first")
    return run.faulted()
