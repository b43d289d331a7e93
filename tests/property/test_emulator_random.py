"""Random instructions in random states: no Python exception, bounded work, nothing half committed."""

from __future__ import annotations

import pytest
from support.random_cases import RandomCases

from emufuzz.case.model import Case, Outcome
from emufuzz.subject.flat import FlatSubject

#: A REP is left after at most 1024 iterations; each makes few callbacks.
MAX_RESTARTS = 1024
MAX_EVENTS = 16 + 8 * MAX_RESTARTS


def violations(case: Case, outcome: Outcome) -> list[str]:
    """What is wrong with an outcome, whatever the instruction was."""
    if outcome.crash:
        return [outcome.crash]
    wrong = []
    if outcome.restarts > MAX_RESTARTS or len(outcome.events) > MAX_EVENTS:
        wrong.append("work")
    if outcome.decode_rc == "ok" and not 1 <= outcome.length <= 15:
        wrong.append("length")
    if outcome.rc != "continue":
        if (outcome.rip, outcome.rflags) != (case.rip, case.rflags):
            wrong.append("RIP or RFLAGS")
        if not outcome.restarts and tuple(outcome.gpr) != case.gpr:
            wrong.append("GPR")
        if (outcome.rc == "propagate_fault") != (outcome.exception is not None):
            wrong.append("exception")
    if any(not 0 <= value < 1 << 64 for value in (*outcome.gpr, outcome.rip, outcome.rflags)):
        wrong.append("range")
    if any(len(page) != 4096 for page in outcome.pages.values()):
        wrong.append("memory")
    return wrong


def run(seed: int, count: int) -> tuple[int, list[str]]:
    """How many of `count` random cases went through, and what was wrong with the others."""
    cases, subject = RandomCases(seed), FlatSubject()
    passed, wrong = 0, []
    for _ in range(count // 100):
        batch = [cases.case() for _ in range(100)]
        for case, outcome in zip(batch, subject.run(batch), strict=True):
            passed += outcome.rc == "continue"
            wrong += [f"{case.mode} {case.code.hex()}: {text}" for text in violations(case, outcome)]
    return passed, wrong


def test_random_instructions():
    passed, wrong = run(seed=1, count=6_000)
    assert wrong == []
    assert passed > 600  # the states are not so odd that nothing works any more


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 140))
def test_two_million_random_instructions(seed):
    _, wrong = run(seed, count=50_000)
    assert wrong == []
