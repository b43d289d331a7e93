"""MOVBE in 16-bit code, in whose place Unicorn runs MOV: results, accesses and flags are those of MOVBE."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import STREAM, case_of, run, trace

from emufuzz.case.build import build_case
from emufuzz.oracle.compare import AGREE, FINDING, judge
from emufuzz.oracle.native_view import FORCED_PREFIX
from emufuzz.oracle.unicorn.short_movbe import as_move, is_short
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

DATA = {0x8000: bytes(range(16))}
# fmt: off
FLAT = {
    "load 16":            ("0f38f004",       {}),
    "load 32":            ("660f38f004",     {}),
    "store 16":           ("0f38f104",       {"rax": 0x11223344}),
    "store 32":           ("660f38f104",     {"rax": 0x11223344}),
    "another segment":    ("2e0f38f004",     {}),
    "the stack":          ("0f38f04600",     {"rbp": 0xC000}),
    "32-bit address":     ("670f38f006",     {}),
    "into its base":      ("0f38f034",       {}),
    "absent":             ("0f38f004",       {"rsi": 0xE000}),
    "absent store":       ("660f38f104",     {"rsi": 0xE000, "rax": 7}),
}
# fmt: on


@pytest.fixture(scope="module")
def subject():
    return FlatSubject(events=False)


def short(mode, code, **options):
    data = {**DATA, 0xC000: bytes(16)}
    return build_case(mode, bytes.fromhex(code), data=data, **{"rsi": 0x8000, "flags": 0x8D7} | options)


@pytest.mark.parametrize("mode", ["prot16", "compat16", "real", "vm86"])
@pytest.mark.parametrize("name", FLAT)
def test_it_agrees_with_the_emulator(oracle, subject, mode, name):
    code, options = FLAT[name]
    case = short(mode, code, **options)
    if mode in {"real", "vm86"} and "rsi" not in options:
        case = msgspec.structs.replace(case, gpr=(*case.gpr[:6], 0, *case.gpr[7:]))
    (ours,), theirs = subject.run([case]), run(oracle, case)
    assert as_move(case) is not None
    assert "unicorn-movbe16" not in {gap for _, gap in oracle.unchecked(case, theirs)}
    assert judge(case, ours, theirs, oracle).kind == AGREE
    ours.gpr = (ours.gpr[0] ^ 0x100, *ours.gpr[1:])
    assert judge(case, ours, theirs, oracle).kind == FINDING


def test_devices_see_the_bytes_in_their_order(oracle):
    case = case_of("prot16", "0f38f104", STREAM, path="ept-misconfig", rsi=0xB000, rax=0x1122)
    assert trace(run(oracle, case)) == [("w", "0xb000", "1122")]
    case = case_of("prot16", "660f38f004", STREAM, path="ept-misconfig", rsi=0xB000)
    outcome = run(oracle, case)
    assert (trace(outcome), outcome.gpr[0]) == ([("r", "0xb000", "00010203")], 0x00010203)
    (ours,) = KvmSubject().run([case])
    assert judge(case, ours, outcome, oracle).kind == AGREE


def test_behind_the_forced_prefix_it_is_the_same(oracle):
    case = short("prot16", "0f38f004")
    case = msgspec.structs.replace(case, code=FORCED_PREFIX + case.code, path="fep")
    (ours,), theirs = KvmSubject().run([case]), run(oracle, case)
    assert ours.gpr[0] == theirs.gpr[0] == 0x0001
    assert judge(case, ours, theirs, oracle).kind == AGREE


def test_in_a_run_of_several_instructions_too(oracle, subject):
    case = msgspec.structs.replace(short("prot16", "0f38f00489c1"), count=2)
    (ours,), theirs = subject.run([case]), run(oracle, case)
    assert theirs.gpr[1] == 0x0001
    assert judge(case, ours, theirs, oracle).kind == AGREE


@pytest.mark.parametrize(("mode", "code", "options"), [
    ("prot32", "0f38f006", {}),
    ("prot16", "8b04", {}),
    ("prot16", "0f38f134", {}),                   # its address is what it stores
    ("prot16", "0f38f004", {"rsi": 0x6100}),      # it reads the page of the code
    ("prot16", "f20f38f004", {}),                 # CRC32
])  # fmt: skip
def test_other_instructions_stay_what_they_are(mode, code, options):
    case = short(mode, code, **options)
    assert as_move(case) is None
    assert is_short(short("prot16", "0f38f004"))
    assert not is_short(short("prot32", "0f38f006"))
