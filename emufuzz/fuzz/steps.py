"""Which of several instructions a disagreement begins with, as a case of its own.

A known quirk of one instruction leaves a state in which later ones end differently, too. So the first
instruction that two engines do not do alike is what is judged.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import AGREE, Verdict, judge
from emufuzz.oracle.unicorn.several import Walk
from emufuzz.subject.base import Subject


class Step(NamedTuple):
    """One instruction on the way, what both sides made of it, and the verdict on that."""

    case: Case
    outcome: Outcome
    answer: Outcome
    verdict: Verdict


def has_steps(case: Case) -> bool:
    """Whether a case has several instructions that can be run one by one: devices would go on."""
    return case.count > 1 and case.path is None and not case.extra and not case.port_in


def first_disagreement(case: Case, subject: Subject, oracle: Oracle) -> Step | None:
    """The first instruction that ends differently; None if all of them agree when they are run alone."""
    walk = Walk(case)
    for _ in range(case.count):
        step = msgspec.structs.replace(walk.whole(), id=case.id)
        if not step.code:
            return None
        [outcome], [answer] = subject.run((step,)), oracle.run((step,))
        if outcome.crash or outcome.rc not in ("continue", "propagate_fault"):
            return None
        verdict = judge(step, outcome, answer, oracle)
        if verdict.kind != AGREE:
            return Step(step, outcome, answer, verdict)
        if outcome.exception is not None:
            return None
        walk.advance(outcome)
    return None
