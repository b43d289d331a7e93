"""Proof tests of the ledger: each fails once Unicorn has lost the gap, or the ledger its entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Case, Fpu, Outcome, TableRegister
from emufuzz.oracle.unicorn.gaps import UNICORN_GAPS

GDT = bytes(8) + bytes.fromhex("ffff0000009acf00")  # code, not accessed yet
PENDING = Fpu(fsw=0x8081)
NON_CANONICAL = 0x8000_0000_0000


@dataclasses.dataclass(frozen=True)
class Proof:
    """A case in the gap, and what Unicorn does there instead of what is right."""

    gap: str
    mode: str
    code: str
    wrong: Callable[[Case, Outcome], bool]
    gpr: dict[int, int] = dataclasses.field(default_factory=dict)
    options: dict[str, object] = dataclasses.field(default_factory=dict)


def completes(case: Case, outcome: Outcome) -> bool:
    return outcome.exception is None and outcome.rip != case.rip


def undefined(_case: Case, outcome: Outcome) -> bool:
    return outcome.exception == (6, None, None)


def gpr_is(number: int, value: int) -> Callable[[Case, Outcome], bool]:
    return lambda _case, outcome: outcome.exception is None and outcome.gpr[number] == value


def faults_at(*fault: int | None) -> Callable[[Case, Outcome], bool]:
    return lambda _case, outcome: outcome.exception == fault


def leaves_descriptor_alone(case: Case, outcome: Outcome) -> bool:
    return completes(case, outcome) and outcome.pages == {}


PROOFS = (
    Proof("segment-limit", "prot32", "8b06", completes, {6: 0x8000}, {"limit": 0x7FFF}),
    Proof("noncanonical-stack", "prot64", "50", faults_at(13, 0, None), {4: NON_CANONICAL + 8}),
    Proof("noncanonical-branch", "prot64", "ffe0", completes, {0: NON_CANONICAL}),
    Proof("lock-invalid", "prot32", "f08906", completes, {6: 0x8000}),
    Proof("pop-8f-reg", "prot32", "8fc8", completes),
    Proof("int1", "prot32", "f1", undefined),
    Proof("rmw-pf-error-code", "prot32", "0106", faults_at(14, 0, 0x1000), {6: 0x1000}),
    Proof("f6-1-ud", "prot32", "f6c801", undefined),
    Proof("seg-prefix-pair", "prot64", "652e8b06", gpr_is(0, 0x03020100), {6: 0x8000}, {"gs": 0x100}),
    Proof(
        "far-transfer",
        "prot32",
        "ea000100000800",
        leaves_descriptor_alone,
        {},
        {"mem": ((0x1000, GDT),), "gdtr": TableRegister(0x1000, 15)},
    ),
    Proof("vex", "prot64", "c5f858c1", completes),
    Proof("virtualization", "prot32", "0f01c1", undefined),
    Proof("lock-neg-flags", "prot32", "f0f71e", lambda _c, o: not o.rflags & 0x80, {6: 0x8000}),
    Proof("shld16-count", "prot32", "660fa4d81f", gpr_is(0, 0x891A), {0: 0x1234, 3: 0xABCD}),
    Proof("cmpxchg32-upper", "prot64", "0fb1d9", gpr_is(0, 5), {0: 1 << 32 | 5, 1: 5, 3: 7}),
    Proof("x87", "prot32", "9b", completes, {}, {"fpu": PENDING}),
    Proof("cache-flush", "prot32", "0fae3e", completes, {6: 0x1000}),
    Proof("iopl", "prot32", "ec", completes, {}, {"cpl": 3}),
    Proof("umip", "prot32", "0f00c8", completes, {}, {"cpl": 3, "cr4": 0xE00}),
    Proof(
        "alignment",
        "prot32",
        "8b06",
        completes,
        {6: 0x8001},
        {"cpl": 3, "cr0": 0x80050011, "rflags": 0x40002},
    ),
    Proof("alignment", "prot64", "0f2806", completes, {6: 0x8001}),
    Proof("c6-reg", "prot32", "c6fb05", gpr_is(3, 5)),
    Proof("ff-7-read", "prot32", "ff3e", faults_at(14, 0, 0x1000), {6: 0x1000}),
    Proof("access-order", "prot32", "a6", faults_at(14, 0, 0x2000), {6: 0x1000, 7: 0x2000}),
    Proof("access-order", "prot32", "60", faults_at(14, 2, 0xBFF0), {4: 0xC010}, {"mem": ()}),
    Proof("66-near-branch", "prot64", "66eb10", lambda _c, o: o.rip == 0x6013, {}, {"rip": 0x16000}),
    Proof("ret-imm-signed", "prot64", "c2f0ff", gpr_is(4, 0xC7F8)),
    Proof("movbe16", "prot16", "0f38f006", gpr_is(0, 0x0F38F006), {}, {"disp": "0060"}),
    Proof("bsf32-upper", "prot64", "0fbcc3", gpr_is(0, 0x55555555), {0: 0x5555555555555555}),
)


def build(proof: Proof, make: Callable[..., Case]) -> Case:
    options = dict(proof.options)
    limit, gs_base, dr7 = options.pop("limit", None), options.pop("gs", None), options.pop("dr7", 0)
    case = make(proof.mode, proof.code + str(options.pop("disp", "")), proof.gpr, **options)
    seg = list(case.system.seg)
    if limit is not None:
        seg[3] = msgspec.structs.replace(seg[3], limit=limit, g=0)
    if gs_base is not None:
        seg[5] = msgspec.structs.replace(seg[5], base=gs_base)
    dr = (*case.system.dr[:7], dr7 or case.system.dr[7])
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg), dr=dr))


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: f"{proof.gap}-{proof.code}")
def test_gap_is_still_there_and_known(oracle, case, proof):
    built = build(proof, case)
    outcome = oracle.run([built])[0]
    assert proof.wrong(built, outcome), outcome
    assert f"unicorn-{proof.gap}" in {gap for _, gap in oracle.unchecked(built, outcome)}


def test_a_move_to_a_debug_register_is_not_run(oracle, case):
    """Its breakpoints would outlive it, and a later run might never return."""
    built = case("prot64", "0f23f8", {0: 0x401})
    outcome = oracle.run([built])[0]
    assert (outcome.rip, outcome.exception) == (built.rip, None)
    assert outcome.unchecked == (("all", "unicorn-breakpoints"),)


@pytest.mark.parametrize(("code", "vector"), [("cd80", 0x80), ("cc", 3), ("ce", 4)])
def test_software_interrupts_are_not_delivered(oracle, case, code, vector):
    outcome = oracle.run([case("prot32", code, rflags=0x802)])[0]
    assert outcome.exception == (vector, None, None)
    assert outcome.unchecked == (("all", "unicorn-int-delivery"),)


def test_a_software_interrupt_that_is_refused_is_judged(oracle, case):
    """INT n in virtual-8086 mode with IOPL below 3, and INTO without overflow."""
    refused, nothing = case("vm86", "cd0d"), case("prot32", "ce")
    ends = oracle.run([refused, nothing])
    assert [end.exception for end in ends] == [(13, 0, None), None]
    assert [oracle.unchecked(c, end) for c, end in zip((refused, nothing), ends, strict=True)] == [(), ()]


def test_a_far_transfer_by_an_accessed_descriptor_is_judged(oracle, case):
    accessed = GDT[:13] + b"\x9b" + GDT[14:]
    options = {"mem": ((0x1000, accessed),), "gdtr": TableRegister(0x1000, 15)}
    built = case("prot32", "ea000100000800", {}, **options)
    outcome = oracle.run([built])[0]
    assert (outcome.exception, outcome.rip, oracle.unchecked(built, outcome)) == (None, 0x100, ())


def test_every_gap_has_a_proof():
    assert {f"unicorn-{proof.gap}" for proof in PROOFS} == {gap.id for gap in UNICORN_GAPS}


@pytest.mark.parametrize("code", ["f00fa3e3", "f00fabe3", "f00fb3e3", "f00fbbe3", "f00fbae001", "f00fbaf801"])
def test_lock_on_a_bit_register_is_never_run(oracle, case, code):
    outcome = oracle.run([case("prot32", code)])[0]
    assert outcome.exception == (6, None, None)
    assert outcome.unchecked == (("all", "unicorn-lock-bit-register"),)


def test_lock_on_a_bit_register_behind_a_branch_is_never_translated(oracle):
    code = bytes.fromhex("0f8f00010000" + "f0470fbaf11f" + "f4")  # jg, not taken; lock btr r9d, 31
    [outcome] = oracle.run([build_case("prot64", code, flags=0x44)])
    assert outcome.exception is None
    assert outcome.unchecked == (("all", "unicorn-lock-bit-register"),)


PLAIN = (
    ("prot32", "01d8", {}),
    ("prot32", "8b06", {6: 0x8000}),
    ("prot16", "8904", {6: 0x8000}),
    ("prot64", "48a5", {6: 0x8000, 7: 0xC000}),
    ("real", "f3a4", {1: 4, 6: 0x8000, 7: 0xC000}),
    ("vm86", "50", {}),
    ("prot64", "c3", {4: 0xC000}),
    ("prot64", "0fabc8", {1: 9}),
    ("prot64", "f3a5", {1: 5, 6: 0x8001, 7: 0xC003}),
)


@pytest.mark.parametrize(("mode", "code", "gpr"), PLAIN)
def test_plain_instructions_fall_into_no_gap(oracle, case, mode, code, gpr):
    mem = ((0x8000, bytes(4096)), (0xC000, bytes(4096)))
    built = case(mode, code, gpr, mem=mem)
    outcome = oracle.run([built])[0]
    assert outcome.exception is None
    assert oracle.unchecked(built, outcome) == ()
