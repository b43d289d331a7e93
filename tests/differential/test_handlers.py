"""KVM's exit handlers against its emulator on generated instructions that exit: nothing is unexplained."""

from __future__ import annotations

import pytest

from emufuzz.fuzz.handlers.differential import Totals, run
from emufuzz.fuzz.handlers.rules import RULES


def _findings(totals: Totals) -> list[str]:
    return [f"{found.case.id} {found.kind} {found.verdict}" for found in totals.unexplained]


def test_every_difference_is_explained():
    totals = run(1, range(3000))
    assert _findings(totals) == []
    assert totals.compared > 2000
    assert totals.equal > 1000
    assert totals.explained > 1000


@pytest.mark.slow
def test_every_difference_of_many_is_explained_and_every_rule_is_needed():
    totals = run(2, range(270_000))
    assert _findings(totals) == []
    assert totals.compared > 200_000
    assert {rule.name for rule in RULES if not totals.rules[rule.name]} == set()
