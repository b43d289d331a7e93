"""Parts of guidance: arcs, features, packed cases, epochs, snapshots, feedback, energies."""

from __future__ import annotations

import pickle
import subprocess
import sys
from random import Random

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_to_obj
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.cells import Tally
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.guided import epochs
from emufuzz.fuzz.guided.arcs import arc_number, arcs_of
from emufuzz.fuzz.guided.features import cell_feature, verdict_feature
from emufuzz.fuzz.guided.feedback import MOST_CANDIDATES, candidates
from emufuzz.fuzz.guided.guide import Guide
from emufuzz.fuzz.guided.packed import pack, unpack
from emufuzz.fuzz.guided.snapshot import Snapshot
from emufuzz.fuzz.kvm.generate import PathGenerator, PathOptions
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

ADD, DIV0 = build_case("prot32", b"\x01\xd8\xf4"), build_case("prot32", b"\xf7\xf1\xf4")


# -- arcs ----------------------------------------------------------------------------------------


def test_arcs_are_those_of_the_case():
    subject = FlatSubject(events=False)
    first, again = arcs_of(subject, ADD), arcs_of(subject, ADD)
    assert first == again
    assert len(first) > 100
    assert arcs_of(subject, DIV0) - first


def test_arcs_are_the_same_in_another_process():
    script = (
        "from emufuzz.case.build import build_case; from emufuzz.subject.flat import FlatSubject\n"
        "from emufuzz.fuzz.guided.arcs import arcs_of\n"
        "subject = FlatSubject(events=False)\n"
        "print(sum(arcs_of(subject, build_case('prot32', bytes.fromhex('01d8f4')))))"
    )
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(other.stdout) == sum(arcs_of(FlatSubject(events=False), ADD))


def test_arcs_cover_the_emulator_and_the_model_of_kvm_and_nothing_else():
    case = next(case for case in PathGenerator(1, 0, PathOptions()).cases(16))
    arcs = arcs_of(KvmSubject(), case)
    files = {arc >> 28 for arc in arcs}
    emulator = {arc_number(f"emulator/{name}.py", 0, 0) >> 28 for name in ("decode", "execute", "x86emul")}
    kvm = {arc_number(f"kvm/{name}.py", 0, 0) >> 28 for name in ("x86", "run", "exits")}
    assert files & emulator
    assert files & kvm
    assert arc_number("subject/kvm/subject.py", 0, 0) >> 28 not in files
    assert all(0 < arc < 1 << 61 for arc in arcs)


def test_a_trace_that_was_there_is_there_again():
    def tracer(frame, event, arg):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        arcs_of(FlatSubject(events=False), ADD)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


# -- features, packed cases ----------------------------------------------------------------------


def test_features_are_told_apart():
    cell = ("01", "prot32", 0, "ok", "")
    found = {cell_feature(cell), cell_feature((*cell[:4], "ud")), verdict_feature("skipped", "a"),
             verdict_feature("finding", "a")}  # fmt: skip
    assert len(found) == 4
    assert all(1 << 61 <= feature < 1 << 62 for feature in found)


@pytest.mark.parametrize("cases", [generate_batch(3, 0, 40), PathGenerator(3, 0, PathOptions()).cases(40)])
def test_a_packed_case_comes_back(cases):
    pieces = {}
    packed = [pack(case) for case in cases]
    for one in packed:
        pieces.update(one.pieces)
    for case, one in zip(cases, packed, strict=True):
        again = unpack(one.data, pieces)
        assert case_to_obj(again) | {"id": case.id} == case_to_obj(case)
    assert sum(len(one.data) for one in packed) < 4000 * len(cases)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "no case of a corpus"), (b"[]", "object"),
        (b'{"code":"90","mem":[{"addr":1,"data":"#00"}]}', "lacks"),
        (b'{"code":"90","mem":[7]}', r"mem\[0\]"), (b'{"code":"90","mem":"x"}', "mem"),
    ],
)  # fmt: skip
def test_what_is_no_packed_case_is_refused(data, message):
    with pytest.raises(CaseError, match=message):
        unpack(data, {})


# -- epochs and snapshots ------------------------------------------------------------------------


def test_every_batch_is_in_one_epoch():
    for epoch in range(12):
        first, following = epochs.first_batch(epoch), epochs.first_batch(epoch + 1)
        assert {epochs.epoch_of(batch) for batch in range(first, following)} == {epoch}


def test_a_batch_waits_for_the_epoch_before_the_last():
    for merged in range(300):
        first = epochs.allowed(merged)
        corpus = epochs.first_batch(epochs.epoch_of(first) - 1)  # what its corpus takes
        assert merged < corpus
        assert epochs.first_batch(epochs.epoch_of(first - 1) - 1) <= merged


def test_a_snapshot_picks_by_energy_and_survives_pickling():
    packed = [pack(case) for case in (ADD, DIV0)]
    pieces = packed[0].pieces | packed[1].pieces
    snapshot = Snapshot(2, [one.data for one in packed], (1, 9), pieces, frozenset((5,)))
    snapshot = pickle.loads(pickle.dumps(snapshot))  # noqa: S301 - our own
    rng = Random(1)
    codes = [snapshot.pick(rng).code for _ in range(500)]
    assert 20 < codes.count(ADD.code) < 90
    assert snapshot.known == {5}


# -- feedback and energies -----------------------------------------------------------------------


def _result(cells):
    return BatchResult(0, cells={cell: Tally(1, 0, i) for i, cell in enumerate(cells)})


def test_what_is_known_is_no_candidate():
    subject, cells = (
        FlatSubject(events=False),
        [("01", "prot32", 0, "ok", ""), ("f7/6", "prot32", 0, "#DE", "")],
    )
    found = candidates(subject, [ADD, DIV0], _result(cells), frozenset())
    assert sorted(candidate.index for candidate in found) == [0, 1]
    known = frozenset(feature for candidate in found for feature in candidate.features)
    assert candidates(subject, [ADD, DIV0], _result(cells), known) == []


def test_new_arcs_come_first_and_there_are_not_too_many():
    cases = generate_batch(5, 0, 200)
    result = _result([(str(i), "real", 0, "ok", "") for i in range(200)])
    result.note("skipped", "because", 150)
    found = candidates(FlatSubject(events=False), cases, result, frozenset())
    assert len(found) == MOST_CANDIDATES
    assert [candidate.arcs for candidate in found] == sorted((c.arcs for c in found), reverse=True)
    assert [candidate.index for candidate in found if candidate.judged] == [150]


def test_places_that_must_not_run_do_not_run():
    cells = [("01", "prot32", 0, "ok", ""), ("f7/6", "prot32", 0, "#DE", "")]
    found = candidates(FlatSubject(events=False), [ADD, DIV0], _result(cells), frozenset(), frozenset((1,)))
    assert [candidate.index for candidate in found] == [0]


def test_a_rare_cell_has_more_energy_than_a_common_one():
    guide, subject = Guide(1, Options()), FlatSubject(events=False)
    cells = [("01", "prot32", 0, "ok", ""), ("f7/6", "prot32", 0, "#DE", "")]
    for number in range(2):
        result = _result(cells)
        result.number = number
        if not number:
            result.candidates = candidates(subject, [ADD, DIV0], result, frozenset())
        result.cells[cells[0]].cases = 5000
        growth = guide.merge(result, whole=True)
    assert growth.epoch == 2
    snapshot = guide.snapshot(2)
    by_code = {snapshot.case(i).code: energy for i, energy in enumerate(snapshot.energies)}
    assert len(by_code) == 2
    assert by_code[DIV0.code] > by_code[ADD.code] >= 1
    assert cell_feature(cells[0]) in snapshot.known
