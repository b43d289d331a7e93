"""The order of checks before an instruction runs, REP, and what is written back."""

from __future__ import annotations

import pytest
from support.emulate import GP, PF, UD, run, segment

from emufuzz.arch.cr import X86_CR0_EM, X86_CR0_TS
from emufuzz.arch.rflags import X86_EFLAGS_DF, X86_EFLAGS_RF, X86_EFLAGS_ZF
from emufuzz.case.build import CODE_BASE, DATA_BASE
from emufuzz.case.model import UNUSABLE, Fpu

ABSENT = 0xB000
CR0, CR4 = 0x80010033, 0x620
PENDING = Fpu(fcw=0x340, fsw=1)
NM, MF = (7, None, None), (16, None, None)


@pytest.mark.parametrize(
    ("name", "mode", "code", "state", "fault"),
    [
        ("LOCK ranks above CPL", "prot64", "f00f0110", {"cpl": 3}, UD),
        ("LOCK needs a memory destination", "prot64", "f001c0", {}, UD),
        ("a far pointer must be in memory", "prot64", "ffd8", {}, UD),
        ("no such instruction in 64-bit mode", "prot64", "06", {"rsp": ABSENT}, UD),
        ("EM ranks above TS", "prot64", "0f1000", {"cr0": CR0 | X86_CR0_EM | X86_CR0_TS}, UD),
        ("no OSFXSR ranks above TS", "prot64", "0f1000", {"cr4": 0x20, "cr0": CR0 | X86_CR0_TS}, UD),
        ("MMX does not need OSFXSR", "prot64", "0f6f00", {"cr4": 0x20, "rax": DATA_BASE}, None),
        ("TS ranks above a pending fault", "prot64", "0f6f00", {"cr0": CR0 | X86_CR0_TS, "fpu": PENDING}, NM),
        ("a pending fault ranks above #PF", "prot64", "0f6f00", {"rax": ABSENT, "fpu": PENDING}, MF),
        ("SSE ignores x87 faults", "prot64", "0f1000", {"rax": ABSENT, "fpu": PENDING}, (PF, 0, ABSENT)),
        ("protected mode only ranks above privilege", "vm86", "0f00d8", {}, UD),
        ("privilege ranks above the operand", "prot64", "0f0110", {"cpl": 3, "rax": ABSENT}, GP),
        ("permission ranks above the operand", "prot32", "6e", {"cpl": 3, "rsi": ABSENT, "tr": UNUSABLE}, GP),
        ("the source is read before the destination", "prot64", "a7", {"rsi": ABSENT, "rdi": 0xD000},
         (PF, 0, ABSENT)),
        ("a destination to be written is read with W", "prot64", "0100", {"rax": ABSENT}, (PF, 2, ABSENT)),
        ("one that will not be is not", "prot64", "3900", {"rax": ABSENT}, (PF, 0, ABSENT)),
        ("the pushed operand is read before the stack", "prot64", "ff30", {"rax": ABSENT, "rsp": 0xD008},
         (PF, 0, ABSENT)),
        ("division by zero comes after the read", "prot64", "f730", {"rax": DATA_BASE}, (0, None, None)),
    ],
)  # fmt: skip
def test_order_of_checks(name, mode, code, state, fault):
    assert run(mode, code, **state).fault == fault, name


def test_a_repeated_instruction_commits_what_it_finished():
    done = run("prot64", "f3aa", rcx=16, rdi=ABSENT - 4, data={0xA000: b""})
    assert done.fault == (PF, 2, ABSENT)
    assert (done.reg("rcx"), done.reg("rdi")) == (12, ABSENT)
    assert (done.rip, done.flags) == (CODE_BASE, done.case.rflags)
    assert done.outcome.restarts == 4


def test_a_long_repetition_leaves_to_the_guest():
    done = run("prot64", "f3a4", rcx=0x500, rsi=DATA_BASE, rdi=DATA_BASE)
    assert (done.rc, done.reg("rcx"), done.rip) == ("continue", 0x400, CODE_BASE)
    assert done.flags & X86_EFLAGS_RF
    rest = run("prot64", "f3a4", rcx=0x400, rsi=DATA_BASE, rdi=DATA_BASE)
    assert (rest.reg("rcx"), rest.rip) == (0, CODE_BASE)  # also with nothing left to do
    last = run("prot64", "f3a4", rcx=0, flags=X86_EFLAGS_RF)
    assert (last.rip, last.flags & X86_EFLAGS_RF) == (CODE_BASE + 2, 0)


@pytest.mark.parametrize(
    ("code", "al", "left"),
    [("f3a6", 0, 1), ("f2a6", 0, 2), ("f3ae", 1, 1), ("f2ae", 2, 0)],
    ids=["repe cmps", "repne cmps", "repe scas", "repne scas"],
)
def test_comparisons_end_by_flag(code, al, left):
    data = {DATA_BASE: b"\x01\x01\x02", DATA_BASE + 16: b"\x01\x07\x02"}
    done = run("prot64", code, rcx=3, rax=al, rsi=DATA_BASE, rdi=DATA_BASE + 16, data=data)
    assert done.reg("rcx") == left
    assert bool(done.flags & X86_EFLAGS_ZF) == (code[:2] == "f2")


def test_direction_and_address_size():
    down = run("prot32", "f366ab", rax=0x4142, rcx=2, rdi=DATA_BASE + 2, flags=X86_EFLAGS_DF)
    assert down.mem(DATA_BASE, 4) == 0x41424142
    assert down.reg("rdi") == DATA_BASE - 2
    narrow = run("prot32", "67f3aa", rcx=0xFFFF0001, rdi=0xFFFF8000, ds=segment("prot32", "ds"))
    assert (narrow.reg("rcx"), narrow.reg("rdi")) == (0xFFFF0000, 0xFFFF8001)


@pytest.mark.parametrize(
    ("code", "events"),
    [
        ("0108", ["read", "write"]),
        ("f00108", ["read", "cmpxchg"]),
        ("8708", ["read", "cmpxchg"]),  # XCHG is always locked
        ("8908", ["write"]),
        ("3908", ["read"]),
        ("0fb108", ["read", "write"]),
        ("f00fb108", ["read", "cmpxchg"]),
        ("0fc108", ["read", "write"]),
    ],
)
def test_how_results_reach_memory(code, events):
    done = run("prot64", code, rax=DATA_BASE, rcx=1)
    assert [event[0] for event in done.events] == events


def test_a_locked_write_that_lost_the_race_starts_again():
    done = run("prot64", "f00108", rax=DATA_BASE, rcx=1, callbacks=[
        {"op": "cmpxchg_emulated", "result": "cmpxchg_failed"}])  # fmt: skip
    assert (done.rc, done.rip, done.outcome.pages) == ("cmpxchg_failed", CODE_BASE, {})
    assert done.flags == done.case.rflags  # the flags of the sum are not committed


def test_pages_are_written_in_order():
    """A write over two pages does the first one even if the second is absent."""
    done = run("prot64", "488908", rax=ABSENT - 4, rcx=0x1122334455667788, data={0xA000: b""})
    assert done.fault == (PF, 2, ABSENT)
    assert done.mem(ABSENT - 4, 4) == 0x55667788
    assert list(done.outcome.pages) == [0xA]
