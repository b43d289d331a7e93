"""Shrinking as a whole: the same finding, to the end or to a limit, with a log and a reason."""

from __future__ import annotations

from functools import lru_cache

import msgspec
import pytest
from support.shrinking import RAX, Finder

from emufuzz.case.build import build_case
from emufuzz.case.json import case_to_json
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.engines import make_oracle, make_subject
from emufuzz.fuzz.finding import ALONE, FAILED, Finding
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.shrink import Limits, non_default_fields, shrink, shrinking_to_obj
from emufuzz.fuzz.shrink.probe import signature
from emufuzz.oracle.compare import Difference

ADC = build_case("prot32", bytes.fromhex("2e 11 9c 93 10 00 00 00 f4"), rax=5, rbx=0x8000, rdx=2, flags=0x8D5)


def seeded(name, modes=("real", "prot64"), size=4096):
    """Findings of a seeded bug, shrunk, and again: [(finding, shrunk, shrunk again)]."""
    with seeded_bug(name):
        loop = CampaignLoop(make_subject(), make_oracle())
        found = loop.run_batch(0, generate_batch(1, 0, size, Options(modes))).findings
        once = [shrink(finding, loop.finding_of) for finding in found[:6]]
        again = [shrink(shrunk.finding, loop.finding_of) for shrunk in once]
    return list(zip(found, once, again, strict=False))


@lru_cache(maxsize=1)
def carry():
    return seeded("adc-carry")


def test_findings_of_a_seeded_bug_come_down_to_one_instruction_and_few_fields():
    assert len(carry()) > 3
    for finding, shrunk, _ in carry():
        assert shrunk.complete
        assert shrunk.reason == ""
        assert shrunk.finding.bucket == finding.bucket
        assert shrunk.finding.case.count == 1
        assert len(non_default_fields(shrunk.finding.case)) <= 5
        assert (shrunk.finding.batch, shrunk.finding.index) == (finding.batch, finding.index)


def test_shrinking_again_changes_nothing():
    for _, once, again in carry():
        assert case_to_json(again.finding.case) == case_to_json(once.finding.case)
        assert again.finding.differences == once.finding.differences
        assert all(not log.kept for log in again.passes)


def test_the_log_says_what_each_pass_did():
    _, shrunk, _ = carry()[0]
    assert sum(log.tried for log in shrunk.passes) <= shrunk.calls
    assert all(log.tried >= log.kept and log.fields_after <= log.fields_before for log in shrunk.passes)
    assert shrunk.passes[0].fields_before >= len(non_default_fields(shrunk.finding.case))
    assert shrunk.passes[-1].fields_after == len(non_default_fields(shrunk.finding.case))
    assert shrinking_to_obj(shrunk) == {
        "passes": [log._asdict() for log in shrunk.passes],
        "complete": True,
        "reason": "",
    }


def test_the_result_is_the_same_every_time():
    finder = Finder(lambda c: c.code[:1] in (b"\x11", b"\x2e") and c.gpr[0] & 4)
    one, two = (shrink(finder.finding(ADC), finder) for _ in range(2))
    assert one == two
    assert one.finding.case.gpr[0] == 4


@pytest.mark.parametrize("calls", [1, 2, 5, 20])
def test_a_limit_of_calls_is_kept_and_said(calls):
    finder = Finder(lambda c: c.gpr[0] == 5 and c.gpr[3] == 0x8000)
    shrunk = shrink(finder.finding(ADC), finder, Limits(calls, 60.0))
    assert shrunk.calls == len(finder.asked) == calls
    assert not shrunk.complete
    assert shrunk.reason == f"incomplete: {calls} calls were not enough"
    assert finder.holds(shrunk.finding.case)


def test_a_limit_of_seconds_is_said():
    finder = Finder(lambda c: c.gpr[0] == 5)
    shrunk = shrink(finder.finding(ADC), finder, Limits(5000, 0.0))
    assert (shrunk.complete, shrunk.reason) == (False, "incomplete: 0 seconds were not enough")


def test_what_is_no_finding_any_more_is_left_alone():
    finder = Finder(lambda c: False)
    shrunk = shrink(finder.finding(ADC), finder)
    assert (shrunk.found, shrunk.reason, shrunk.calls) == (False, "the case is now no finding", 1)
    assert shrunk.finding.case == ADC


def test_a_finding_that_is_another_one_now_says_which():
    finder, other = Finder(lambda c: True), Finder(lambda c: True, leaf="90")
    shrunk = shrink(finder.finding(ADC), other)
    assert not shrunk.found
    assert shrunk.reason == f"the case is now {other.finding(ADC).bucket.name}"


def test_a_hang_is_not_tried_again():
    hang = Finding("fb", "hang", FAILED, 0, 0, ADC, (Difference("oracle", "hang", "", "late"),))
    finder = Finder(lambda c: True)
    shrunk = shrink(hang, finder)
    assert finder.asked == []
    assert (shrunk.complete, shrunk.reason) == (False, "a hang would hang again")


def test_more_than_one_instruction_and_many_fields_are_reasoned_one_by_one():
    names = ("rax", "rcx", "rdx", "rbx", "rsi", "rdi")
    case = build_case("prot32", bytes.fromhex("f911d8"), **dict.fromkeys(names, 1))
    case = msgspec.structs.replace(case, count=2)
    finder = Finder(lambda c: c.count == 2 and all(c.gpr[i] for i in (0, 1, 2, 3, 6, 7)))
    shrunk = shrink(finder.finding(case), finder)
    assert shrunk.complete
    assert shrunk.reason == (
        "2 instructions: with any fewer it is another finding or none; 7 fields: no finding without "
        "gpr.rax, gpr.rcx, gpr.rdx, gpr.rbx, gpr.rsi, gpr.rdi, count"
    )


def test_cases_that_cannot_be_are_not_run():
    finder = Finder(lambda c: True)
    shrink(finder.finding(ADC), finder)
    assert len({case_to_json(case) for case in finder.asked}) == len(finder.asked)


def crash(text):
    return Finding("fb", "crash", FAILED, 0, 0, ADC, (Difference("emulator", "crash", text, ""),))


def test_a_failure_stays_the_same_failure_but_for_numbers():
    trace = "Traceback (most recent call last):\n  File a, line {}\nValueError: 0x{}"
    assert signature(crash(trace.format(1, "10"))) == signature(crash(trace.format(99, "ff")))
    assert signature(crash(trace.format(1, "10"))) != signature(crash("KeyError: 1"))
    assert signature(crash("exit code 3")) == signature(crash("exit code 4"))


def test_a_disagreement_stays_in_its_bucket_only():
    one = Finding("fb", "gpr", ALONE, 0, 0, ADC, RAX)
    other = msgspec.structs.replace(one, differences=(Difference("rbx", "gpr", "0x1", "0x2"),))
    assert signature(one) == signature(other) == (one.bucket,)
