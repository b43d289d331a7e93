"""Code breakpoints, which come before an exit, and accesses to the local APIC that are undefined."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome, code_address
from emufuzz.oracle.exits.run import NoExitError, Run, UndefinedError
from emufuzz.oracle.local_apic import is_defined
from emufuzz.oracle.native_view import judge_case, kvm_of

_ENABLED: Final = 3  # L and G of a breakpoint in DR7
_KIND: Final = 0xF  # its R/W and LEN: 0 is an instruction
#: Blocking by MOV SS, which holds breakpoints back; STI does not (SDM Vol. 3A 6.8.3).
_SHADOW: Final = 2
#: Paths on which KVM emulates an instruction that hardware has not begun.
_EMULATED: Final = ("fep", "invalid-guest-state")


def breaks(case: Case) -> bool:
    """An enabled code breakpoint is on the instruction (SDM Vol. 3B 18.2.4), which RF does not let pass."""
    dr = case.system.dr
    if case.path is None or not dr[7] & 0xFF or case.rflags & X86_EFLAGS_RF:
        return False
    if kvm_of(case).get("interruptibility", 0) & _SHADOW or case.count != 1:
        return False
    address = code_address(judge_case(case))
    return any(
        dr[7] >> 2 * i & _ENABLED and not dr[7] >> 16 + 4 * i & _KIND and dr[i] == address for i in range(4)
    )


def code_breakpoint(run: Run) -> Outcome:
    """#DB before the instruction (SDM Vol. 3B 18.3.1.1).

    Raises:
        NoExitError: Hardware would have raised it before the exit.
        UnsupportedCaseError: An event is queued, too.
    """
    if run.case.path not in _EMULATED:
        raise NoExitError("dr: the breakpoint comes before the exit")
    for field in ("pending", "vectoring_info", "interrupt", "nmi"):
        if run.kvm.get(field):
            raise UnsupportedCaseError(f"kvm.{field}: an event is delivered first")
    outcome = run.faulted((DB_VECTOR, None, None))
    outcome.rip = judge_case(run.case).rip
    return outcome


def apic_access(run: Run) -> Outcome:
    """Of accesses to the local APIC only some are defined, and other oracles run those.

    Raises:
        UndefinedError: It is not one of 32 bits at the beginning of a register (SDM Vol. 3A 10.4.1).
        UnsupportedCaseError: It is, or page tables tell where it is.
    """
    if not is_defined(run.case, judge_case(run.case)):
        raise UndefinedError("path: apic-access with other than 32 bits at the start of a register")
    raise UnsupportedCaseError("path: the instruction at RIP tells how the case ends")
