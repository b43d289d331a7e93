"""MSR accesses that userspace completes: what the exit says, and that completing them is progress."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.json import outcome_from_json, outcome_to_json
from emufuzz.subject.kvm import KvmSubject

FORCED = b"\x0f\x0bkvm"
FILTER = {"knobs": {"msr_denied": "0x10a", "user_space_msr_mask": 7}}


def run(code, *, known):
    system = build_system("prot32", msr=((0x10A, 5),)) if known else build_system("prot32")
    case = build_case("prot32", FORCED + code, system=system, rcx=0x10A)
    case = msgspec.structs.replace(case, path="msr-completion", extra={"kvm": FILTER})
    return case, KvmSubject().run([case])[0]


@pytest.mark.parametrize(("code", "reason"), [(b"\x0f\x32", "X86_RDMSR"), (b"\x0f\x30", "X86_WRMSR")])
def test_the_reason_of_the_exit_and_that_of_the_access_are_two_members(code, reason):
    case, outcome = run(code, known=True)
    (left,) = outcome.extra["exits"]
    assert left["reason"] == reason
    assert left["msr_reason"] == 4  # KVM_MSR_EXIT_REASON_FILTER
    assert outcome_from_json(outcome_to_json(case, outcome), case).extra["exits"] == [left]


def test_a_completed_write_is_no_livelock():
    case, outcome = run(b"\x0f\x30", known=True)
    assert outcome.rip == case.rip + len(FORCED) + 2
    assert "livelock" not in outcome.extra


def test_a_denied_write_is_a_fault():
    _, outcome = run(b"\x0f\x30", known=False)
    assert outcome.exception[0] == 13
