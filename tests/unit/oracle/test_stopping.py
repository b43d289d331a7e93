"""A repeated string instruction is judged up to the iteration at which KVM left for userspace."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import STREAM, case_of, run

from emufuzz.oracle.compare import AGREE, FINDING, judge
from emufuzz.oracle.stopping import oracle_at_stop

ZEROS = {**STREAM, "behaviour": "ram", "reads": ""}
# fmt: off
REPEATED = {
    "stos":            case_of("prot64", "f3aa", ZEROS, path="ept-violation", rdi=0xB000, rcx=9, rax=0x55),
    "movs downwards":  case_of("prot32", "f3a5", STREAM, path="ept-violation", rsi=0xB020, rdi=0x8020, rcx=6,
                               flags=0x400),
    "lods, 16 bits":   case_of("real", "f3ad", STREAM, path="ept-violation", rsi=0xB000, rcx=0x10005),
    "scas":            case_of("prot64", "f2ae", ZEROS, path="ept-violation", rdi=0xB000, rcx=7, rax=1),
    "ecx":             case_of("prot64", "67f3aa", ZEROS, path="fep", rdi=0xB000, rcx=4, rax=1),
    "outs":            case_of("prot64", "f36e", path="io-string", rsi=0x8000, rdx=0x60, rcx=5),
}
# fmt: on


def stopped(oracle, case, done):
    """What a subject says that stopped after `done` iterations."""
    short = msgspec.structs.replace(case, gpr=(case.gpr[0], done, *case.gpr[2:]))
    outcome = run(oracle, short)
    left = (case.gpr[1] & 0xFFFF) - done | case.gpr[1] & ~0xFFFF
    outcome.gpr = (outcome.gpr[0], left, *outcome.gpr[2:])
    outcome.extra = {**(outcome.extra or {}), "exits": []}
    return outcome


@pytest.mark.parametrize("name", REPEATED)
@pytest.mark.parametrize("done", [1, 3])
def test_stopping_early_is_no_difference(oracle, name, done):
    case = REPEATED[name]
    ours, theirs = stopped(oracle, case, done), run(oracle, case)
    assert ours.gpr != theirs.gpr
    assert judge(case, ours, theirs, oracle).kind == AGREE


@pytest.mark.parametrize("name", REPEATED)
def test_what_was_done_by_then_is_compared(oracle, name):
    case = REPEATED[name]
    ours, theirs = stopped(oracle, case, 2), run(oracle, case)
    wrong = msgspec.structs.replace(ours, gpr=(*ours.gpr[:3], ours.gpr[3] ^ 1, *ours.gpr[4:]))
    assert judge(case, wrong, theirs, oracle).kind == FINDING
    trace = ours.extra["device_trace"]
    wrong = msgspec.structs.replace(ours, extra={"device_trace": trace[:-1]})
    assert judge(case, wrong, theirs, oracle).kind == FINDING


def test_a_fault_beyond_the_stop_is_not_the_subjects(oracle):
    case = case_of("prot64", "f3aa", STREAM, path="ept-violation", rdi=0xCFFE, rcx=9)
    ours, theirs = stopped(oracle, case, 2), run(oracle, case)
    assert theirs.exception == (14, 2, 0xD000)
    assert judge(case, ours, theirs, oracle).kind == AGREE


def test_no_progress_is_a_finding(oracle):
    case = REPEATED["stos"]
    stuck = msgspec.structs.replace(run(oracle, case), gpr=case.gpr, rip=case.rip, extra={"device_trace": []})
    assert judge(case, stuck, run(oracle, case), oracle).kind == FINDING


@pytest.mark.parametrize("code", ["90", "f390", "f3c3"])
def test_other_instructions_are_not_asked_about_again(oracle, code):
    case = case_of("prot64", code, path="fep", rcx=5)
    answer = run(oracle, case)
    ours = msgspec.structs.replace(answer, rip=case.rip, gpr=(0, 3, *case.gpr[2:]))
    assert oracle_at_stop(case, ours, answer, oracle) is answer
