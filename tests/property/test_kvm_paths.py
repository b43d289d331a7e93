"""Every exit path, fuzzed: no crash, and each result where it can occur (docs/kvm-paths.md)."""

from __future__ import annotations

import pytest
from support.path_results import documented, results_of

from emufuzz.case.paths import PATHS
from emufuzz.fuzz.kvm.results import CRASH, HANG, NO_EXIT, RESULTS

QUICK = 300
LONG = 100_000
#: Of the cases of a path so many may miss their exit.
MISSED = 0.25


@pytest.mark.parametrize("path", PATHS)
def test_a_few_cases_of_each_path(path):
    found, crash = results_of(path, QUICK)
    must, may = documented()[path]
    assert crash is None
    assert found["OK"] or path in ("msr-completion", "task-switch")
    assert set(found) <= must | may | {NO_EXIT}


@pytest.mark.soak  # half an hour on two cores
@pytest.mark.parametrize("path", PATHS)
def test_a_hundred_thousand_cases_of_each_path(path):
    found, crash = results_of(path, LONG)
    must, may = documented()[path]
    assert crash is None
    assert must <= set(found)
    assert set(found) <= must | may | {NO_EXIT}
    assert found[NO_EXIT] < MISSED * LONG


def test_the_table_names_every_path_and_result():
    table = documented()
    assert tuple(table) == PATHS
    named = {name for must, may in table.values() for name in must | may}
    assert named | {"INTERCEPTED", "FAIL_ENTRY"} == set(RESULTS) - {NO_EXIT, CRASH, HANG}
