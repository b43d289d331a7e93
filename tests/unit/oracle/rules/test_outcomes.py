"""Every rule about outcomes: kept by what the SDM says, broken by one change to that."""

from __future__ import annotations

import pytest

from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.rules.table import BY_ID
from tests.unit.oracle.rules import samples_state, samples_ways

SAMPLES = (*samples_state.SAMPLES, *samples_ways.SAMPLES)


def _broken(case, outcome) -> set[str]:
    return {violation.rule for violation in RulesOracle().review(case, outcome)}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_what_is_right_breaks_no_rule(sample):
    assert _broken(sample.case, sample.good) == set()


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_what_is_wrong_breaks_the_rule(sample):
    assert sample.rule in _broken(sample.case, sample.bad)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_the_rule_alone(sample):
    rule = BY_ID[sample.rule]
    assert rule.check(sample.case, sample.good) is None
    violation = rule.check(sample.case, sample.bad)
    assert violation is not None
    assert violation.rule == sample.rule
    assert violation.demand
    assert violation.found
