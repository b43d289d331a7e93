"""What Unicorn does not check, others do: broken emulators that agree with it and are found all the same.

The table of docs/blind-spots.md is compared with what is shown here.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard

from emufuzz.case.build import TSS_BASE, build_case, build_system
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import UNUSABLE, Segment
from emufuzz.case.segments import segment_code, segment_data, tss_bytes
from emufuzz.case.vectors import vector_from_json
from emufuzz.fuzz.blind_bugs import BLIND_BUGS
from emufuzz.fuzz.bugs import BUGS, seeded_bug
from emufuzz.fuzz.engines import SUBJECTS
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import AGREE, FINDING
from emufuzz.oracle.exits import ExitsOracle
from emufuzz.oracle.native import NativeOracle
from emufuzz.oracle.quirks import explaining_quirk
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.vectors import VectorsOracle
from emufuzz.oracle.verdict import combine, objection, opinions_of
from emufuzz.subject.flat import FlatSubject
from tests.unit.oracle.exits.tasks import CALL, FREE32, task_case

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests" / "data" / "vectors" / "kvm-6.12.jsonl.zst"
DOCUMENT = ROOT / "docs" / "blind-spots.md"
NON_CANONICAL = 0x8000_0000_0000
ABSENT = 0xB000
BOTH = ("native", "rules")
RULES = ("rules",)


@dataclass(frozen=True)
class Spot:
    """A case that shows a bug, and who objects to it; `changes` are segments and fields of System."""

    bug: str
    mode: str
    code: str
    catchers: tuple[str, ...]
    cpl: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    data: dict[int, bytes] = field(default_factory=dict)
    gpr: dict[str, int] = field(default_factory=dict)

    def build(self):
        system = build_system(self.mode, self.cpl, **self.changes)
        return build_case(self.mode, bytes.fromhex(self.code), system=system, data=self.data, **self.gpr)


def flat(kind, of_type):
    """A flat 32-bit segment for CPL 3 of a type of its own."""
    return msgspec.structs.replace(kind(0x40 | 3, bits=32, dpl=3), type=of_type)


SHORT = {"ds": segment_data(0x40 | 3, bits=32, dpl=3, limit=0x8003)}
READ_ONLY = {"ds": flat(segment_data, 1)}
EXECUTE_ONLY = {"cs": flat(segment_code, 9)}
CLOSED = {TSS_BASE: tss_bytes(io_allowed=False)}
#: Port 60h is open, 61h is not.
HALF_OPEN = {TSS_BASE + 102: b"\x80\0", TSS_BASE + 0x80 + 0x60 // 8: b"\x02\0"}
LONG_TASK = {"tr": Segment(0x50, TSS_BASE, 0x200, 11, p=1)}
#: DR7.GD is set.
DETECTED = (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x2400)
NO_SYSENTER = {"msr": ((0x174, 0), (0x175, 0), (0x176, 0))}

# fmt: off
SPOTS = (
    Spot("limit-last-byte", "prot32", "8b06", BOTH, 3, SHORT, gpr={"rsi": 0x8001}),
    Spot("limit-last-byte", "real", "8b04", RULES, data={0xF000: b"", 0x10000: b""}, gpr={"rsi": 0xFFFF}),
    Spot("type-read-only", "prot32", "8906", BOTH, 3, READ_ONLY, gpr={"rsi": 0x8000}),
    Spot("type-execute-only", "prot32", "2e8b06", BOTH, 3, EXECUTE_ONLY, gpr={"rsi": 0x8000}),
    Spot("null-segment", "prot32", "8b06", BOTH, 3, {"ds": UNUSABLE}, gpr={"rsi": 0x8000}),
    Spot("movaps-alignment", "prot64", "0f2806", BOTH, 3, gpr={"rsi": 0x8001}),
    Spot("stack-canonical", "prot64", "50", BOTH, 3, gpr={"rsp": NON_CANONICAL + 8}),
    Spot("branch-canonical", "prot64", "ffe0", BOTH, 3, gpr={"rax": NON_CANONICAL}),
    Spot("iopl", "prot32", "ec", RULES, 3, data=CLOSED, gpr={"rdx": 0x60}),
    Spot("io-bitmap-width", "prot32", "66ed", RULES, 3, LONG_TASK, HALF_OPEN, {"rdx": 0x60}),
    Spot("cr-value", "prot32", "0f22c0", RULES, gpr={"rax": 0x80000010}),
    Spot("cr-value", "prot32", "0f22e0", RULES, gpr={"rax": 1 << 31}),
    Spot("dr-detect", "prot32", "0f21c0", RULES, changes={"dr": DETECTED}),
    Spot("dr-value", "prot64", "0f23f8", RULES, gpr={"rax": 1 << 32}),
    Spot("wrmsr-value", "prot64", "0f30", RULES, changes={"msr": ((0xC0000082, 0),)},
         gpr={"rcx": 0xC0000082, "rdx": NON_CANONICAL >> 32}),
    Spot("lock-mov", "prot32", "f08906", BOTH, 3, gpr={"rsi": 0x8000}),
    Spot("pop-8f-reg", "prot32", "8fc8", BOTH, 3),
    Spot("int1-undefined", "prot32", "f1", RULES, 3),
    Spot("int-undefined", "prot32", "cd80", RULES, 3),
    Spot("syscall-disabled", "prot64", "0f05", RULES, changes={"efer": 0x500}),
    Spot("sysenter-null", "prot32", "0f34", RULES, 3, NO_SYSENTER),
    Spot("rmw-error-code", "prot32", "0106", BOTH, 3, gpr={"rsi": ABSENT}),
)
#: Bugs of which only recordings of KVM know better -> the vector that shows it.
IN_VECTORS = {
    "rdmsr-unknown": "real-232-7096",
    "int-real-if": "real-1cd-3863",
    "vex-legacy": "prot64-1c4-39534",
}
# fmt: on


@pytest.fixture(scope="module")
def subject():
    return FlatSubject(events=False)


@pytest.fixture(scope="module")
def unicorn():
    oracle = UnicornOracle()
    yield oracle
    oracle.close()


@pytest.fixture(scope="module")
def native():
    """None where the host has no such oracle; the rules are then alone in what both see."""
    try:
        oracle = NativeOracle()
    except OracleUnavailableError:
        yield None
        return
    yield oracle
    oracle.close()


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """The vectors of IN_VECTORS: id -> case, and an oracle that has them."""
    marks = [f'"{name}"' for name in IN_VECTORS.values()]
    with RECORDED.open("rb") as raw:
        reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        lines = [line for line in io.TextIOWrapper(reader) if any(mark in line for mark in marks)]
    path = tmp_path_factory.mktemp("vectors") / "some.jsonl"
    path.write_text("".join(lines))
    cases = [vector_from_json(line)[0] for line in lines]
    return {case.id: case for case in cases}, VectorsOracle([path])


def ruling_of(case, subject, *oracles):
    """What the oracles say together; the rules by what they demand of the subject's outcome."""
    answers, broken = [], None
    for oracle in oracles:
        if isinstance(oracle, RulesOracle):
            differences = oracle.differences(case, subject)
            (demanded,) = oracle.run([case])
            excuse = explaining_quirk(case, subject, demanded, differences) if differences else None
            broken = objection(oracle.name, subject, differences, excuse or "")
        elif takes(oracle, case):
            answers.append((oracle, oracle.run([case])[0]))
    opinions = opinions_of(case, subject, answers)
    return combine(subject, [*opinions, broken] if broken is not None else opinions)


def takes(oracle, case):
    try:
        oracle.check(case)
    except UnsupportedCaseError:
        return False
    return True


def run_both(subject, case, bug, *, same_flags=False):
    """The outcomes of the emulator as it is, and with a bug."""
    (right,) = subject.run([case])
    with seeded_bug(bug):
        (broken,) = subject.run([case])
    assert not right.crash
    assert not broken.crash
    alike = (broken.rc, broken.exception, broken.rflags) == (right.rc, right.exception, right.rflags)
    assert alike == same_flags
    assert broken != right
    return right, broken


@pytest.mark.parametrize("spot", SPOTS, ids=lambda spot: f"{spot.bug}-{spot.mode}-{spot.code}")
def test_unicorn_is_silent_and_another_oracle_objects(subject, unicorn, native, spot):
    case = spot.build()
    right, broken = run_both(subject, case, spot.bug)
    others = {oracle.name: oracle for oracle in (native, RulesOracle()) if oracle is not None}
    assert ruling_of(case, broken, unicorn).kind != FINDING
    for name in spot.catchers:
        if name in others:
            assert ruling_of(case, broken, others[name]).against == (name,)
    together = ruling_of(case, broken, unicorn, *others.values())
    assert together.kind == FINDING
    assert set(together.against) == set(spot.catchers) & set(others)
    assert ruling_of(case, right, unicorn, *others.values()).kind != FINDING


@pytest.mark.parametrize("bug", IN_VECTORS)
def test_recordings_object_where_no_other_oracle_vouches(subject, unicorn, native, recorded, bug):
    cases, vectors = recorded
    case = cases[IN_VECTORS[bug]]
    right, broken = run_both(subject, case, bug)
    engines = [oracle for oracle in (unicorn, native, RulesOracle()) if oracle is not None]
    assert ruling_of(case, broken, *engines).kind != FINDING
    together = ruling_of(case, broken, *engines, vectors)
    assert (together.kind, together.against) == (FINDING, ("vectors",))
    assert ruling_of(case, right, *engines, vectors).kind != FINDING


def test_the_oracle_of_exits_objects_to_a_broken_task_switch(unicorn, native):
    """Task switches are no instruction at RIP: no engine takes them."""
    case, machine, exits = task_case(CALL | FREE32), SUBJECTS["kvm"](), ExitsOracle()
    right, broken = run_both(machine, case, "task-switched", same_flags=True)
    engines = [oracle for oracle in (unicorn, native) if oracle is not None]
    assert not any(takes(oracle, case) for oracle in engines)
    assert ruling_of(case, broken, *engines).kind != FINDING
    assert ruling_of(case, broken, *engines, exits).against == ("exits",)
    assert ruling_of(case, right, *engines, exits).kind == AGREE


def test_alignment_at_cpl_3_is_seen_by_others_alone(subject, unicorn, native):
    """KVM itself checks no alignment below 16 bytes: there is nothing to break."""
    system = build_system("prot32", 3, cr0=0x80050033)
    case = build_case("prot32", b"\x8b\x06", system=system, flags=0x40000, rsi=0x8001)
    (outcome,) = subject.run([case])
    assert outcome.exception is None
    assert ruling_of(case, outcome, unicorn).kind == AGREE
    assert ruling_of(case, outcome, RulesOracle()).kind != AGREE
    if native is not None:
        assert ruling_of(case, outcome, native).kind != AGREE


@pytest.mark.parametrize("code", ["0f21e0", "0f23e8"])
def test_unicorn_sees_debug_registers_that_do_not_exist(unicorn, code):
    """MOV DR4 and DR5 with CR4.DE set; without it they are DR6 and DR7."""
    for cr4, wanted in ((8, (6, None, None)), (0, None)):
        case = build_case("prot32", bytes.fromhex(code), system=build_system("prot32", cr4=cr4))
        (outcome,) = unicorn.run([case])
        assert (outcome.exception, unicorn.unchecked(case, outcome)) == (wanted, ())


def documented():
    """Bug -> oracles in the table of the document."""
    rows = re.findall(
        r"^\|[^|]*\| `([a-z0-9-]+)` \|[^|]*\| ([a-z, ]+) \|$", DOCUMENT.read_text(), re.MULTILINE
    )
    return {bug: set(names.split(", ")) for bug, names in rows}


def test_the_document_names_every_bug_and_who_catches_it():
    shown: dict[str, set[str]] = {bug: {"vectors"} for bug in IN_VECTORS}
    shown["task-switched"] = {"exits"}
    for spot in SPOTS:
        shown.setdefault(spot.bug, set()).update(spot.catchers)
    assert shown.keys() == BLIND_BUGS.keys()
    assert documented() == shown


def test_bugs_have_one_name_each_and_leave_nothing_behind(subject):
    assert not BUGS.keys() & BLIND_BUGS.keys()
    cases = [spot.build() for spot in SPOTS]
    before = subject.run(cases)
    for bug in BLIND_BUGS:
        with seeded_bug(bug):
            subject.run(cases)
    assert subject.run(cases) == before
