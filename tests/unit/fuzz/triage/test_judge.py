"""Judges of single cases: in this process, and in one of their own that a case may end."""

from __future__ import annotations

import os

import pytest
from support.misbehaving import (
    MARK,
    CannotWorkHere,
    Dies,
    Hangs,
    Liar,
    NeverStarts,
    Raises,
    StartsAtSecondTry,
    Twin,
    setup_with,
    subject,
)

from emufuzz.case.build import build_case
from emufuzz.fuzz.triage import PanelJudge, ProcessJudge
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED

NOP = build_case("prot32", b"\x90", id="harmless")
REAL = build_case("real", b"\x90", id="a lie")
REFUSED = build_case("prot32", b"\xd7\x0f\x01\xc5"[1:], id="refused")
VICTIM = build_case("prot32", b"\x90", id=Dies.victim)


@pytest.fixture
def judge_with():
    """Makes judges in a process of their own, and ends them."""
    judges = []

    def make(oracle, **options):
        judges.append(ProcessJudge(setup_with(oracle), **options))
        return judges[-1]

    yield make
    for judge in judges:
        judge.close()


def test_what_the_present_code_makes_of_a_case():
    judge = PanelJudge(subject(), Liar())
    assert judge.judge(NOP).ruling.kind == AGREE
    lie = judge.judge(REAL)
    assert (lie.ruling.kind, lie.stands) == (FINDING, True)
    assert [difference.field for difference in lie.ruling.differences] == ["rbx"]


def test_what_the_subject_refuses_leaves_nothing_to_compare():
    found = PanelJudge(subject(), Twin()).judge(REFUSED)
    assert found.ruling.kind == SKIPPED
    assert found.refused == found.ruling.reason
    assert found.refused.startswith("subject-unhandleable")
    assert not found.stands


def test_what_is_raised_is_a_failure_and_settles_nothing():
    found = PanelJudge(subject(), Raises()).judge(VICTIM)
    assert found.stands
    assert found.failed.endswith("ValueError: victim")


def test_a_process_of_its_own_says_the_same(judge_with):
    here, there = PanelJudge(subject(), Liar()), judge_with(Liar)
    for case in (NOP, REAL, REFUSED):
        assert there.judge(case).ruling == here.judge(case).ruling


@pytest.mark.parametrize(("oracle", "says"), [
    (Dies, "the process ended: exit code 3"), (Hangs, "no answer for 3 s"), (Raises, "ValueError: victim"),
])  # fmt: skip
def test_a_case_that_ends_its_judge_costs_nothing_but_its_judgement(judge_with, oracle, says):
    judge = judge_with(oracle, seconds=3.0)
    found = judge.judge(VICTIM)
    assert found.stands
    assert found.failed.endswith(says)
    assert judge.judge(NOP).ruling.kind == AGREE


@pytest.mark.parametrize(("oracle", "says"), [
    (CannotWorkHere, "twin: not on this machine"), (NeverStarts, "the judge ended at its start"),
])  # fmt: skip
def test_a_judge_that_cannot_work_here_says_so(judge_with, oracle, says):
    with pytest.raises(OracleUnavailableError, match=says):
        judge_with(oracle).judge(NOP)


def test_a_judge_that_is_killed_while_it_starts_is_started_again(judge_with, monkeypatch, tmp_path):
    monkeypatch.setenv(MARK, str(tmp_path / "tried"))
    assert judge_with(StartsAtSecondTry).judge(NOP).ruling.kind == AGREE
    assert (tmp_path / "tried").exists()


def test_closing_ends_the_process(judge_with):
    judge = judge_with(Twin)
    judge.judge(NOP)
    pid = judge._process.pid
    judge.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
