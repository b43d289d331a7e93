"""Recorded outcomes as an oracle."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.delta import outcome_to_delta
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.json import case_to_obj
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import AGREE, FINDING, judge
from emufuzz.oracle.vectors import VectorsOracle
from emufuzz.subject.flat import FlatSubject

CASES = [build_case("prot64", b"\x48\x01\xd8", rax=value, rbx=2, id=f"add-{value}") for value in range(4)]


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "some.jsonl"
    outcomes = FlatSubject().run(CASES)
    lines = [
        json.dumps({"case": case_to_obj(case), "expect": outcome_to_delta(case, outcome)})
        for case, outcome in zip(CASES, outcomes, strict=True)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_was_recorded_is_answered_whatever_its_name(recorded):
    oracle = VectorsOracle([recorded])
    renamed = [msgspec.structs.replace(case, id="other") for case in CASES]
    for case, subject, answer in zip(renamed, FlatSubject().run(CASES), oracle.run(renamed), strict=True):
        oracle.check(case)
        assert judge(case, subject, answer, oracle).kind == AGREE
    assert len(oracle) == 4
    assert oracle.fingerprint()["cases"] == "4"


def test_a_different_outcome_is_a_finding(recorded):
    oracle = VectorsOracle([recorded])
    (subject,) = FlatSubject().run(CASES[:1])
    subject.gpr = (7, *subject.gpr[1:])
    (answer,) = oracle.run(CASES[:1])
    assert judge(CASES[0], subject, answer, oracle).kind == FINDING


def test_other_cases_are_refused_and_vouched_for_by_nobody(recorded):
    oracle = VectorsOracle([recorded])
    for case in (msgspec.structs.replace(CASES[0], rflags=3), msgspec.structs.replace(CASES[0], path="fep")):
        with pytest.raises(UnsupportedCaseError, match="not recorded"):
            oracle.check(case)
    (answer,) = oracle.run([msgspec.structs.replace(CASES[0], rflags=3)])
    assert oracle.unchecked(CASES[0], answer) == (("all", "vectors-not-recorded"),)


def test_files_that_cannot_be_read_make_it_unavailable(tmp_path):
    with pytest.raises(OracleUnavailableError, match="nowhere"):
        VectorsOracle([Path(tmp_path / "nowhere.jsonl")])
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"case":{}}\n')
    with pytest.raises(OracleUnavailableError, match="broken"):
        VectorsOracle([broken])
