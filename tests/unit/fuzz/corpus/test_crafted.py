"""Crafted cases are valid ones that their subject takes, and enter what they are about."""

from __future__ import annotations

from itertools import islice

import pytest

from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.fuzz.corpus import crafted
from emufuzz.fuzz.corpus.crafted import GROUPS, crafted_cases
from emufuzz.fuzz.corpus.legal import legal_pairs, reached_pairs
from emufuzz.fuzz.corpus.observe import Observer

#: Of a group so many enter KVM at least, or are taken by the emulator; tables of pages are made by chance.
MINIMUM = dict.fromkeys(GROUPS, 0.5) | {"paging": 0.2}


@pytest.mark.parametrize("group", [name for name in GROUPS if name != "leaf"])
def test_cases_are_valid_and_most_of_them_are_tested(group):
    observer = Observer(arcs=False)
    cases = list(islice(GROUPS[group](), 0, None, 97))
    taken = []
    for case in cases:
        read = case_from_json(case_to_json(case))
        assert case_from_json(case_to_json(read)) == read
        observed = observer.observe(read)
        taken.append(observed is not None and observed.cell[3] not in ("no-exit", "crash", "hang"))
    assert sum(taken) >= MINIMUM[group] * len(taken)


def test_the_leaf_cases_reach_every_legal_leaf_in_every_mode():
    observer = Observer(arcs=False)
    cells = [observer.observe(case).cell for case in GROUPS["leaf"]()]
    assert reached_pairs(cells) == legal_pairs()
    assert sum(outcome == "ok" for _, _, _, outcome, _ in cells) > 0.9 * len(cells)


def test_ids_name_the_group():
    assert [case.id for case in islice(crafted_cases(), 2)] == ["leaf-0", "leaf-1"]


def test_they_are_run_as_they_come(monkeypatch):
    monkeypatch.setattr(crafted, "GROUPS", {"apic": GROUPS["apic"], "calls": GROUPS["hyperv"]})
    observer = Observer(arcs=False)
    cases = list(islice(crafted_cases(), 0, None, 211))
    assert any("lapic" in case.extra["kvm"] for case in cases)
    for case in cases:
        assert case_from_json(case_to_json(case)) == case
        assert observer.observe(case) is not None
