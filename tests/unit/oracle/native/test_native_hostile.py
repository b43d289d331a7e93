"""What a hostile case does to its child stays there, and costs no other case its outcome."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
from pathlib import Path
from typing import Any

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.native import run as native_run
from emufuzz.oracle.native.layout import CODE_SIZE
from emufuzz.oracle.native.plan import Plan, plan_of

MODES = ("prot16", "prot32", "compat16", "compat32", "prot64")
BASE = build_case("prot64", bytes.fromhex("ffc0f4"), cpl=3)
COMPAT = build_case("compat32", bytes.fromhex("ffc0f4"), cpl=3)
NEIGHBOURS = 20


def hostile(code: str, base: Case = BASE, **gpr: int) -> Case:
    return build_case(base.mode, bytes.fromhex(code), system=base.system, mem=base.mem, rip=0x6800, **gpr)


def among_others(oracle: Any, case: Case, base: Case = BASE) -> Outcome:
    """The outcome of a case in the middle of harmless ones, all of which must come out right."""
    others = [
        msgspec.structs.replace(base, id=str(n), gpr=(n, *base.gpr[1:]), rip=0x6000 + 32 * n)
        for n in range(NEIGHBOURS)
    ]
    half = NEIGHBOURS // 2
    outcomes = oracle.run([*others[:half], case, *others[half:]])
    result = outcomes.pop(half)
    assert [outcome.gpr[0] for outcome in outcomes] == [n + 1 for n in range(NEIGHBOURS)]
    assert [outcome.id for outcome in outcomes] == [other.id for other in others]
    assert {(o.exception, o.crash, o.hang, len(o.pages)) for o in outcomes} == {(None, "", False, 0)}
    return result


@pytest.fixture
def unguarded(monkeypatch):
    """Run whatever comes, system calls included, and single-step nothing."""

    def reckless(code: bytes, mode: str, bits: int) -> Plan:
        return dataclasses.replace(plan_of(code, mode, bits), system_call=False, step=False)

    monkeypatch.setattr(native_run, "plan_of", reckless)


@pytest.mark.parametrize("code", ["0f05", "0f34", "cd80", "480f05", "0f01c1", "0f01d9", "0f01d4"])
@pytest.mark.parametrize("base", [BASE, COMPAT], ids=["prot64", "compat32"])
def test_system_calls_are_not_run(native, code, base):
    if code.startswith("48") and base is COMPAT:
        code = code[2:]
    starts = native._runner.starts
    native.run([base])
    outcome = among_others(native, hostile(code + "f4", base), base)
    assert outcome.unchecked == (("all", "native-system-call"),)
    assert (outcome.rip, outcome.gpr) == (0x6800, hostile(code, base).gpr)
    assert native._runner.starts <= starts + 2


# getpid, open, exit_group, kill(-1), and exit, which the strict mode allows
@pytest.mark.parametrize("number", [39, 2, 231, 62, 60])
def test_a_system_call_that_gets_through_ends_the_child_only(unguarded, impatient, number):
    outcome = among_others(impatient, hostile("0f05f4", rax=number, rdi=(1 << 64) - 1, rsi=9))
    assert outcome.crash.startswith("native: killed by SIG" if number != 60 else "native: exited with")


@pytest.mark.parametrize("number", [20, 1, 11])
def test_a_32_bit_system_call_that_gets_through_ends_the_child_only(unguarded, impatient, number):
    outcome = among_others(impatient, hostile("cd80f4", COMPAT, rax=number), COMPAT)
    assert outcome.crash.startswith("native: ")


def test_sysenter_that_gets_through_does_not_get_far(unguarded, impatient):
    outcome = among_others(impatient, hostile("0f34f4", COMPAT, rax=20), COMPAT)
    assert outcome.crash or outcome.exception in {(6, None, None), (13, 0, None)}


@pytest.mark.parametrize("size", [1, 16, 4096])
def test_a_case_that_answers_for_the_child_is_found_out(unguarded, impatient, size):
    outcome = among_others(impatient, hostile("0f05f4", rax=1, rdi=1, rsi=0x8000, rdx=size))
    assert outcome.crash == "native: it wrote to its parent by itself"


def test_a_read_that_never_ends_is_a_hang(unguarded, impatient):
    outcome = among_others(impatient, hostile("0f05f4", rax=0, rdi=0, rsi=0x8000, rdx=1))
    assert (outcome.hang, outcome.crash) == (True, "")


@pytest.mark.parametrize("code", ["ebfe", "e2fe", "f390ebfc"])
def test_an_endless_loop_is_a_hang(unguarded, impatient, code):
    outcome = among_others(impatient, hostile(code, rcx=1 << 63))
    assert (outcome.hang, outcome.crash) == (True, "")


UNDEFINED, PRIVILEGED = (6, None, None), (13, 0, None)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("0f0b", UNDEFINED), ("0fb9c0", UNDEFINED), ("0fff00", UNDEFINED), ("0f04", UNDEFINED),
        ("06", UNDEFINED), ("f4", PRIVILEGED), ("0f30", PRIVILEGED), ("0f22c0", PRIVILEGED),
        ("0f01f8", PRIVILEGED), ("ee", PRIVILEGED), ("0f09", PRIVILEGED), ("0f0111", PRIVILEGED),
        ("0f33", PRIVILEGED),
    ],
)  # fmt: skip
def test_what_is_undefined_or_privileged_faults(native, code, fault):
    starts = native._runner.starts
    assert among_others(native, hostile(code + "f4")).exception == fault
    assert native._runner.starts <= starts + 1


@pytest.mark.parametrize("code", ["0f31", "0f01f9", "0fa2", "0fc7f0", "0fc7f8", "0f01d0"])
def test_what_shows_the_host_is_not_vouched_for(native, code):
    """RDTSC, RDTSCP, CPUID, RDRAND, RDSEED and XGETBV: run, or refused by the host; judged by nobody."""
    case = hostile(code + "f4")
    outcome = among_others(native, case)
    assert not outcome.crash
    assert ("all", "native-identity") in native.unchecked(case, outcome)


def test_an_endless_loop_is_single_stepped(native):
    outcome = among_others(native, hostile("ebfe"))
    assert (outcome.rip, outcome.hang, outcome.exception) == (0x6800, False, None)


@pytest.mark.parametrize("code", ["f3aa", "f3a4", "f3a5", "f3ae", "f2ae", "f3ac", "f3a6", "f36c", "f36e"])
def test_an_endless_repetition_ends(native, code):
    outcome = among_others(native, hostile(code + "f4", rcx=(1 << 64) - 1, rdi=0x8000, rsi=0x8000))
    assert not outcome.hang
    assert not outcome.crash


def test_writes_over_the_code(native):
    outcome = among_others(native, hostile("f3aaf4", rcx=0x700, rdi=0x6100, rax=0xCC))
    assert not outcome.hang
    assert not outcome.crash
    assert outcome.pages[6][0x100:0x120] == b"\xcc" * 0x20


@pytest.mark.parametrize("rsp", [0x6808, 0x6810, 0x8000, 0, 8, (1 << 47) - 8, (1 << 64) - 8])
def test_pushes_anywhere(native, rsp):
    outcome = among_others(native, hostile("50f4", rsp=rsp, rax=0x9090909090909090))
    assert (outcome.exception is None) == (0x6000 <= rsp - 8 < 0xD000)


def aims(oracle: Any) -> dict[str, int]:
    """Addresses of the runner's own memory, which a case cannot know."""
    oracle.run([BASE] * NEIGHBOURS)
    child = next(c for c in oracle._runner.children() if 6 in c.index and not c.layout.ldt)
    arena, start = child.arena, child.layout.base + CODE_SIZE
    return {
        "code": child.layout.base + 0x200,
        "control": start + arena.control,
        "inputs": start + arena.records_in + 0x100,
        "outputs": start + arena.records_out + 0x8000,
        "pristine": start + arena.pristine,
        "pool": start + arena.pool,
        "stack": start + arena.live + 0x8000,
        "stack top": start + arena.live + 0x10000,
    }


@pytest.mark.parametrize("place", ["code", "inputs", "pristine"])
def test_what_the_child_only_reads_cannot_be_written(impatient, place):
    address = aims(impatient)[place]
    outcome = among_others(impatient, hostile("488907f4", rdi=address, rax=(1 << 64) - 1))
    assert outcome.exception == (14, 6, address)


@pytest.mark.parametrize("place", ["control", "pool", "stack", "stack top"])
@pytest.mark.parametrize("code", ["488907", "50", "ffd0", "ff37", "0f2ae0"])
def test_writes_into_the_runner_and_stacks_in_it(impatient, place, code):
    address = aims(impatient)[place]
    case = hostile(code + "f4", rdi=address, rsp=address + 8, rax=0x6820)
    outcome = impatient.run([case])[0]
    assert outcome.id == case.id
    after = among_others(impatient, BASE)
    assert after.gpr[0] == 1


@pytest.mark.parametrize("offset", range(0, 0x400, 0x55))
def test_jumps_into_the_handler(impatient, offset):
    address = aims(impatient)["code"] - 0x200 + 0x80 + offset
    outcome = impatient.run([hostile("ffe0f4", rax=address)])[0]
    assert outcome.rip == address  # single-stepped: nothing of the handler has run
    assert among_others(impatient, BASE).gpr[0] == 1


def test_a_child_that_is_ended_from_outside_is_replaced(impatient):
    impatient.run([BASE] * NEIGHBOURS)
    for child in impatient._runner.children():
        os.kill(child.pid, signal.SIGKILL)
    outcomes = impatient.run([BASE] * NEIGHBOURS)
    assert [outcome.gpr[0] for outcome in outcomes[1:]] == [1] * (NEIGHBOURS - 1)
    assert outcomes[0].crash == "native: killed by SIGKILL"


def test_a_child_that_is_stopped_is_a_hang_and_is_replaced(impatient):
    impatient.run([BASE] * NEIGHBOURS)
    child = next(c for c in impatient._runner.children() if 6 in c.index and not c.layout.ldt)
    os.kill(child.pid, signal.SIGSTOP)
    outcomes = impatient.run([BASE] * NEIGHBOURS)
    assert outcomes[0].hang
    assert [outcome.gpr[0] for outcome in outcomes[1:]] == [1] * (NEIGHBOURS - 1)


def test_children_end_with_the_oracle(impatient):
    impatient.run([BASE] * NEIGHBOURS)
    pids = [child.pid for child in impatient._runner.children()]
    assert pids
    impatient.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def random_cases(seed: int, count: int) -> list[Case]:
    """Random bytes, with registers that may be addresses."""
    rng = random.Random(seed)
    bases = {mode: build_case(mode, b"\x90", cpl=3) for mode in MODES}
    values = (0, 1, 0x8000, 0x8FF8, 0xC800, 0x6000, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
    cases = []
    for number in range(count):
        base = bases[MODES[number // 500 % len(MODES)]]
        width = 64 if base.mode == "prot64" else 32
        gpr = [rng.choice(values) if rng.random() < 0.7 else rng.getrandbits(width) for _ in range(16)]
        flags = rng.getrandbits(22) & 0x244DD5 | 2
        cases.append(
            msgspec.structs.replace(
                base,
                id=str(number),
                code=rng.randbytes(rng.randrange(1, 16)),
                gpr=tuple(gpr),
                rip=0x6000 + 32 * rng.randrange(256),
                rflags=flags,
            )
        )
    return cases


def surroundings(oracle: Any) -> tuple[Any, ...]:
    """What a child could have touched: descriptors, processes, signal state and directory of this one."""
    files = len(list(Path("/proc/self/fd").iterdir()))
    held = 3 * len(oracle._runner.children())  # two pipes and the memory
    children = {int(pid) for pid in Path("/proc/thread-self/children").read_text(encoding="ascii").split()}
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    signals = tuple(
        line for line in status if line.startswith(("SigP", "SigB", "SigI", "SigC", "Shd", "Seccomp"))
    )
    known = {child.pid for child in oracle._runner.children()}
    return files - held, children - known, signals, sorted(Path.cwd().iterdir())


def check_random(oracle: Any, seed: int, count: int) -> None:
    cases = random_cases(seed, count)
    before = surroundings(oracle)
    outcomes = oracle.run(cases)
    assert surroundings(oracle) == before
    assert [outcome.id for outcome in outcomes] == [case.id for case in cases]
    assert not any(outcome.hang for outcome in outcomes)
    crashed = [case.code.hex() for case, outcome in zip(cases, outcomes, strict=True) if outcome.crash]
    assert crashed == []
    assert oracle.run([BASE])[0].gpr[0] == 1


def test_random_bytes_are_contained(native):
    check_random(native, 1, 5000)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 22))
def test_200000_random_byte_strings_are_contained(native, seed):
    check_random(native, seed, 10_000)
