"""Every rule that demands an exception: kept by that exception, broken by others and by none."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.rules.table import BY_ID
from tests.unit.oracle.rules import samples_decode, samples_values

SAMPLES = (*samples_decode.SAMPLES, *samples_values.SAMPLES)


def _broken(case, outcome) -> set[str]:
    return {violation.rule for violation in RulesOracle().review(case, outcome)}


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_the_exception_must_come(sample):
    assert _broken(sample.case, sample.good) == set()
    assert sample.rule in _broken(sample.case, sample.bad)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_the_rule_alone(sample):
    rule = BY_ID[sample.rule]
    assert rule.check(sample.case, sample.good) is None
    violation = rule.check(sample.case, sample.bad)
    assert violation is not None
    assert (violation.rule, violation.field, violation.found) == (sample.rule, "exception", "no exception")


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_another_vector_breaks_it(sample):
    vector = 8 if sample.good.exception[0] != 8 else 10
    outcome = msgspec.structs.replace(sample.good, exception=(vector, 0, None))
    assert sample.rule in _broken(sample.case, outcome)
