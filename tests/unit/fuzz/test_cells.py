"""Cells: which one a case falls into, what is counted, where its first case is."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from emufuzz.case.build import build_case
from emufuzz.case.model import Outcome
from emufuzz.fuzz.cells import Tally, add_cells, add_tallies, cell_of, cells_of, cpl_of, outcome_name
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.engines import SUBJECTS
from emufuzz.fuzz.examples import generated_case
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.kvm.generate import PathOptions, generator_of
from emufuzz.subject.flat import FlatSubject

NOP = b"\x90"


def outcome(case, **fields):
    return Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, **fields)


def with_dpl(case, dpl):
    seg = list(case.system.seg)
    seg[2] = replace(seg[2], dpl=dpl)
    return replace(case, system=replace(case.system, seg=tuple(seg)))


@pytest.mark.parametrize(
    ("mode", "dpl", "cpl"),
    [("real", 0, 0), ("real", 3, 0), ("vm86", 3, 3), ("vm86", 0, 3), ("prot32", 2, 2), ("prot64", 3, 3)],
)
def test_cpl(mode, dpl, cpl):
    assert cpl_of(with_dpl(build_case(mode, NOP), dpl)) == cpl


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({}, "ok"),
        ({"rc": "propagate_fault", "exception": (13, 0, None)}, "#GP"),
        ({"rc": "propagate_fault", "exception": (14, 2, 0x1000)}, "#PF"),
        ({"rc": "propagate_fault", "exception": (77, None, None)}, "vector 77"),
        ({"rc": "unhandleable", "reason": "because"}, "unhandleable"),
        ({"crash": "Traceback", "exception": (13, 0, None)}, "crash"),
        ({"hang": True}, "hang"),
        ({"extra": {"no_exit": "why"}}, "no-exit"),
        ({"extra": {"injected": [{"vector": 6}]}}, "#UD"),
        ({"extra": {"injected": [], "exits": []}}, "ok"),
        ({"rc": "io_needed", "extra": {"exits": []}}, "io_needed"),
    ],
)
def test_name_of_an_outcome(fields, name):
    case = build_case("prot32", NOP)
    assert outcome_name(outcome(case, **fields)) == name
    assert cells_of([case], [outcome(case, leaf="90", **fields)]) == [("90", "prot32", 0, name, "")]


@pytest.mark.parametrize("subject", ["emulator", "kvm"])
def test_every_case_of_a_batch_is_in_the_cell_that_it_is_said_to_be_in(subject):
    options = PathOptions() if subject == "kvm" else Options()
    cases = generator_of(1, 0, options).cases(600)
    outcomes = SUBJECTS[subject]().run(cases)
    tallies = {}
    for first in range(0, 600, 128):
        add_cells(tallies, cases[first : first + 128], outcomes[first : first + 128], first)
    each = [cell_of(*pair) for pair in zip(cases, outcomes, strict=True)]
    assert {cell: tally.cases for cell, tally in tallies.items()} == Counter(each)
    for cell, tally in tallies.items():
        assert each.index(cell) == tally.index
        assert cases[tally.index].code == tally.code
    assert {path for *_, path in tallies} == ({case.path or "" for case in cases})


def test_parts_of_a_batch_keep_the_first_case():
    cell = ("90", "real", 0, "ok", "")
    total = {cell: Tally(2, 1, 30, b"b")}
    add_tallies(total, {cell: Tally(1, 1, 20, b"a"), (*cell[:4], "fep"): Tally(1, 0, 21, b"c")})
    add_tallies(total, {cell: Tally(1, 0, 40, b"d")})
    assert total == {cell: Tally(4, 2, 20, b"a"), (*cell[:4], "fep"): Tally(1, 0, 21, b"c")}


def test_a_place_gives_its_case_again():
    cases = generate_batch(7, 3, 200)
    config = CampaignConfig(seed=7)
    assert generated_case(config, 3, 150) == cases[150]
    [again] = FlatSubject(events=False).run([generated_case(config, 3, 150)])
    assert cell_of(generated_case(config, 3, 150), again)[1] == cases[150].mode
