"""Several instructions: the first one that ends differently is what is judged."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from emufuzz.case.build import build_case
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.steps import first_disagreement, has_steps
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

#: TZCNT EAX, EBX runs as BSF in KVM, a known quirk; MOV [ESI], EAX then stores what that left.
QUIRK_FIRST = bytes.fromhex("f30fbcc3 8906 f4")
NOP_QUIRK = bytes.fromhex("90 f30fbcc3 f4")


@pytest.fixture(scope="module")
def loop():
    return CampaignLoop(FlatSubject(events=False), UnicornOracle())


def several(code, count, **registers):
    return replace(build_case("prot32", code, **registers), count=count)


@pytest.mark.parametrize(("code", "rip"), [(QUIRK_FIRST, 0x6000), (NOP_QUIRK, 0x6001)])
def test_a_quirk_on_the_way_explains_what_follows(loop, code, rip):
    case = several(code, 2, rax=7, rsi=0x8000)
    step = first_disagreement(case, loop.subject, loop.oracle)
    assert step.verdict.reason == "kvm-quirk-06-tzcnt-lzcnt"
    assert (step.case.rip, step.case.count) == (rip, 1)
    result = loop.run_batch(0, [case])
    assert result.skipped == {"kvm-quirk-06-tzcnt-lzcnt": 1}
    assert result.firsts == {("skipped", "kvm-quirk-06-tzcnt-lzcnt"): 0}
    assert result.cases == 1


def test_a_bug_on_the_way_is_the_finding(loop):
    case = several(
        bytes.fromhex("90 f9 83d000 8906 f4"), 4, rax=1, rsi=0x8000
    )  # stc; adc eax, 0; mov [esi], eax
    with seeded_bug("adc-carry"):
        result = loop.run_batch(3, [case])
    [finding] = result.findings
    assert (finding.leaf, finding.case.count) == ("83/2", 1)
    assert finding.case.code.startswith(bytes.fromhex("83d000"))
    assert sum(tally.findings for tally in result.cells.values()) == 1


def test_what_agrees_has_no_step(loop):
    assert first_disagreement(several(bytes.fromhex("90 40 f4"), 2), loop.subject, loop.oracle) is None


def test_cases_with_devices_are_judged_as_a_whole():
    case = several(QUIRK_FIRST, 2)
    assert has_steps(case)
    assert not has_steps(replace(case, port_in=b"\1"))
    assert not has_steps(replace(case, count=1))
    assert not has_steps(replace(case, extra={"devices": [{"kind": "pio", "port": 1, "size": 1}]}))
