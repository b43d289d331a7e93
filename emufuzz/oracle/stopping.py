"""Where a repeated string instruction stopped: any iteration is as good as another.

A processor may be interrupted between iterations (SDM Vol. 2B REP). KVM stops where it leaves for
userspace, which an oracle cannot know. It is asked again, for as many iterations as KVM did.
"""

from __future__ import annotations

import msgspec

from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.operands import prefix_facts


def oracle_at_stop(case: Case, subject: Outcome, answer: Outcome, oracle: Oracle) -> Outcome:
    """What the oracle says of the iterations that the subject did: `answer`, or another one.

    Args:
        case: With the path on which KVM got it.
        subject: Stopped at the instruction, without exception.
        answer: What the oracle said of the case.
        oracle: Asked again if the subject did fewer iterations.
    """
    left = subject.gpr[VCPU_REGS_RCX]
    view = judge_case(case)
    if subject.exception is not None or subject.rip != view.rip:
        return answer
    if answer.exception is None and left == answer.gpr[VCPU_REGS_RCX]:
        return answer
    mask = _count_mask(view)
    done = case.gpr[VCPU_REGS_RCX] - left & mask
    if not mask or not done or done > case.gpr[VCPU_REGS_RCX] & mask:
        return answer
    rest = (case.gpr[VCPU_REGS_RCX] & mask) - done
    (again,) = oracle.run([_with_count(case, case.gpr[VCPU_REGS_RCX] & ~mask | done)])
    again.gpr = _replaced(again.gpr, again.gpr[VCPU_REGS_RCX] + rest)
    return again


def _count_mask(case: Case) -> int:
    """Which bits of RCX count the iterations; 0 if nothing is repeated."""
    facts = prefix_facts(case)
    if not facts.rep or not CaseInstruction(case).string_opcode:
        return 0
    if case.mode == "prot64":
        return 0xFFFFFFFF if facts.small_ad else 0xFFFFFFFFFFFFFFFF
    wide = bool(case.system.seg[VCPU_SREG_CS].db)
    return 0xFFFFFFFF if wide != facts.small_ad else 0xFFFF


def _with_count(case: Case, rcx: int) -> Case:
    return msgspec.structs.replace(case, gpr=_replaced(case.gpr, rcx))


def _replaced(gpr: tuple[int, ...], rcx: int) -> tuple[int, ...]:
    return (gpr[0], rcx, *gpr[VCPU_REGS_RCX + 1 :])
