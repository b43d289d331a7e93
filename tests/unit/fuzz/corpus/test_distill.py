"""Arcs, covers, and distilled sets: small, covering the same, short, and the same each time."""

from __future__ import annotations

import sys

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.json import case_to_json
from emufuzz.fuzz.corpus.arcs import ArcTracer
from emufuzz.fuzz.corpus.cover import greedy_cover
from emufuzz.fuzz.corpus.distill import distill
from emufuzz.fuzz.corpus.legal import legal_pairs, reached_pairs
from emufuzz.fuzz.corpus.observe import Observer
from emufuzz.fuzz.corpus.reduce import reduce_case
from emufuzz.fuzz.generate import generate_batch
from emufuzz.subject.flat import FlatSubject

ADD = build_case("prot32", b"\x01\xd8\xf4", rax=1, rbx=2)
FAULT = build_case("prot32", b"\x01\x1b\xf4", rbx=0xD000)
FLAT = FlatSubject(events=False)


def test_arcs_are_those_of_the_case_that_ran():
    tracer = ArcTracer()
    (outcome,), add = tracer.run(lambda: FLAT.run([ADD]))
    (_,), fault = tracer.run(lambda: FLAT.run([FAULT]))
    assert outcome.gpr[0] == 3
    assert {file.split("/")[0] for file, _, _ in add | fault} == {"emulator"}
    assert fault - add
    assert add - fault


def test_only_the_files_asked_for_are_traced():
    _, everything = ArcTracer().run(lambda: FLAT.run([ADD]))
    _, some = ArcTracer().run(lambda: FLAT.run([ADD]), frozenset(["emulator/decode.py"]))
    assert some == {arc for arc in everything if arc[0] == "emulator/decode.py"}


def test_what_traced_before_traces_again_also_after_an_error():
    def other(*_):
        return None

    before = sys.gettrace()
    sys.settrace(other)
    try:
        with pytest.raises(ZeroDivisionError):
            ArcTracer().run(lambda: 1 // 0)
        assert sys.gettrace() is other
    finally:
        sys.settrace(before)


def test_a_cover_has_every_element_and_takes_the_largest_first():
    sets = [{1, 2}, {1, 2, 3, 4}, {4, 5}, {5}, set()]
    chosen = greedy_cover(sets, [1, 1, 9, 1, 1])
    assert [(place, sorted(new)) for place, new in chosen] == [(1, [1, 2, 3, 4]), (3, [5])]


def test_of_equal_gains_the_cheapest_then_the_first_is_taken():
    assert [place for place, _ in greedy_cover([{1, 2}, {1, 2}, {1, 2}], [5, 3, 3])] == [1]
    assert greedy_cover([], []) == []


@pytest.fixture(scope="module")
def cases():
    return generate_batch(11, 0, 100)


def test_a_distilled_set_covers_what_all_cover_with_fewer_and_shorter_cases(cases):
    observer = Observer(("leaf", "mode"))
    small = distill(cases, observer)
    before = set().union(*(observer.observe(case).elements for case in cases))
    after = set().union(*(observer.observe(case).elements for case in small))
    assert before <= after
    assert len(small) < len(cases)
    sizes = [len(case_to_json(case)) for case in small]
    assert sum(sizes) / len(sizes) < sum(len(case_to_json(case)) for case in cases) / len(cases) / 10


def test_distilling_gives_the_same_again(cases):
    aspects = ("leaf", "mode")
    assert distill(cases[:30], Observer(aspects)) == distill(cases[:30], Observer(aspects))


def test_cells_alone_are_cheap_and_coarser_aspects_keep_fewer(cases):
    fine = distill(cases, Observer(arcs=False), reduce=False)
    coarse = distill(cases, Observer(("leaf",), arcs=False), reduce=False)
    assert len(coarse) < len(fine) < len(cases)
    assert all(case in cases for case in coarse)


def test_a_reduced_case_works_and_has_nothing_else():
    case = msgspec.structs.replace(ADD, gpr=tuple(range(16)))
    reduced = reduce_case(case, lambda other: FLAT.run([other])[0].gpr[:4] == (3, 1, 2, 3))
    assert reduced.gpr[:4] == (0, 1, 2, 3)
    assert not any(reduced.gpr[4:])
    assert not any(segment.p for i, segment in enumerate(reduced.system.seg) if i != 1)
    assert len(case_to_json(reduced)) < len(case_to_json(case)) / 5


def test_a_case_that_its_subject_cannot_take_covers_nothing():
    refused = msgspec.structs.replace(ADD, extra={"kvm": {}})
    assert Observer().observe(refused) is None
    assert distill([refused, ADD], Observer(), reduce=False) == [ADD]


def test_a_case_that_does_not_enter_kvm_reaches_no_leaf():
    case = msgspec.structs.replace(ADD, path="ept-violation")
    observed = Observer(("leaf", "mode"), arcs=False).observe(case)
    assert observed.cell[3] == "no-exit"
    assert observed.elements == frozenset()
    assert reached_pairs([observed.cell]) == frozenset()


def test_legal_pairs_leave_out_what_the_tables_forbid():
    pairs = legal_pairs()
    assert ("06", "prot32") in pairs
    assert ("06", "prot64") not in pairs  # PUSH ES: not in 64-bit mode
    assert ("0f00/2", "prot32") in pairs
    assert not {("0f00/2", "real"), ("0f00/2", "vm86")} & pairs  # LLDT needs protected mode
    assert ("63.mode64", "prot64") in pairs
    assert ("63.mode64", "prot32") not in pairs
