"""Single-step traps and breakpoints, which Unicorn has not, around a run without them.

SDM Vol. 3B 18.3.1.4: with RFLAGS.TF set there is #DB after an instruction that does not fault. That is added
to the outcome of a run with TF clear, unless the instruction sees or changes TF, or is repeated.
"""

from __future__ import annotations

from typing import Final

import msgspec
from iced_x86 import Mnemonic, Register

from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome, code_address
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import judge_case, kvm_of

_DR7_GD: Final = 1 << 13
_DR7_ENABLED: Final = 3
_DR7_KIND: Final = 0xF
_LINEAR32: Final = 0xFFFFFFFF

#: What stores TF, loads it, clears it, or enters a handler that does; what hides a trap (SDM Vol. 3A 6.8.3).
_SEES_TF: Final = frozenset(
    value
    for name, value in vars(Mnemonic).items()
    if name.startswith(("PUSHF", "POPF", "IRET", "INT", "SYS", "VM", "RSM", "UD", "XBEGIN"))
)
_STACK_LOADS: Final = (Mnemonic.MOV, Mnemonic.POP)


def check_debugging(case: Case) -> None:
    """Raise UnsupportedCaseError if TF or breakpoints do something that cannot be added to a plain run."""
    dr7 = case.system.dr[7]
    if dr7 & _DR7_GD:
        raise UnsupportedCaseError("dr: unicorn has no general detection")
    if dr7 & 0xFF and _breaks(case):
        raise UnsupportedCaseError("dr: unicorn has no breakpoints")
    if case.rflags & X86_EFLAGS_TF and not _can_be_stepped(case):
        raise UnsupportedCaseError("rflags: unicorn does not trap after an instruction")


def without_trap(case: Case) -> Case:
    """The case with TF clear."""
    return msgspec.structs.replace(case, rflags=case.rflags & ~X86_EFLAGS_TF)


def with_trap(outcome: Outcome) -> Outcome:
    """The outcome of a run with TF clear, with TF set and the trap behind it."""
    outcome.rflags |= X86_EFLAGS_TF
    if outcome.exception is None and not outcome.crash and not outcome.hang:
        outcome.exception = (DB_VECTOR, None, None)
    return outcome


def _breaks(case: Case) -> bool:
    """Whether an enabled breakpoint is on data, or on the instruction, which RFLAGS.RF would let pass."""
    if case.count != 1:
        return True
    dr = case.system.dr
    enabled = [i for i in range(4) if dr[7] >> 2 * i & _DR7_ENABLED]
    if any(dr[7] >> 16 + 4 * i & _DR7_KIND for i in enabled):
        return True
    view = judge_case(case)
    if view.rflags & X86_EFLAGS_RF and case.rflags & X86_EFLAGS_RF:
        return False
    starts = {code_address(case), code_address(view)}
    return any(dr[i] in starts or dr[i] & _LINEAR32 in starts for i in enabled)


def _can_be_stepped(case: Case) -> bool:
    if case.count != 1 or kvm_of(case).get("guest_debug"):
        return False
    instruction = CaseInstruction(judge_case(case))
    decoded = instruction.decode(lax=True)
    repeated = decoded.has_rep_prefix or decoded.has_repne_prefix
    loads_stack = instruction.mnemonic in _STACK_LOADS and decoded.op0_register == Register.SS
    return not (instruction.mnemonic in _SEES_TF or repeated or loads_stack)
