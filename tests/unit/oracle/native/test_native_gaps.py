"""Proof tests of the native ledger: each fails once the host does as the case asks, or an entry is lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Case, Memory, Outcome, Segment
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native.gaps import ATTACHED, native_gaps
from emufuzz.oracle.native.host import Host
from emufuzz.oracle.native.runner import SHARED_FROM

Wrong = Callable[[Case, Outcome], bool]
HIGH = 0xFFFF_8000_0000_0000
IF, IOPL3, TF = 1 << 9, 3 << 12, 1 << 8


@dataclasses.dataclass(frozen=True)
class Proof:
    """A case in the gap, and what happens there instead of what the case's machine would do."""

    gap: str
    mode: str
    code: str
    wrong: Wrong
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    system: dict[str, Any] = dataclasses.field(default_factory=dict)
    vendor: str = ""


def faults(*fault: int | None) -> Wrong:
    return lambda _case, outcome: outcome.exception == fault


def completes(case: Case, outcome: Outcome) -> bool:
    return outcome.exception is None and outcome.rip > case.rip


def gpr_is_not(number: int, value: int) -> Wrong:
    return lambda _case, outcome: outcome.exception is None and outcome.gpr[number] != value


def ends_at(rip: int) -> Wrong:
    return lambda _case, outcome: outcome.exception is None and outcome.rip == rip


def sets(flags: int) -> Wrong:
    return lambda _case, outcome: outcome.exception is None and outcome.rflags & flags == flags


def pushes(value: bytes) -> Wrong:
    return lambda _case, outcome: outcome.pages[0xC][0x7F8 : 0x7F8 + len(value)] == value


GENERAL_PROTECTION = faults(13, 0, None)


def with_fs_base(base: int) -> tuple[Segment, ...]:
    seg = build_system("prot64", 3).seg
    return (*seg[:4], msgspec.structs.replace(seg[4], base=base), *seg[5:])


def load_of(mode: str) -> dict[str, int]:
    """A selector that the case's GDT has a data segment for, and the host's has not."""
    return {"rax": build_system(mode, 3).seg[3].sel}


#: FS is 64 KiB below 2^64, so that an offset above all canonical ones leads to a linear address that is.
BELOW_BASE = {"rdi": 1 << 47}
FS_AT_THE_END = {"seg": with_fs_base((1 << 64) - (1 << 16))}
IN_HIGH_PAGE = {"rdi": HIGH, "mem": Memory(((HIGH, b"\1"),))}
#: A call target that is not canonical, and a stack that is not there.
NOWHERE = {"rdi": 0x8000, "rsp": 0xB008, "mem": Memory(((0x8000, (1 << 60).to_bytes(8, "little")),))}

#: An enabled breakpoint on the code, which is at 6000H.
ON_CODE = (0x6000, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x402)

# fmt: off
PROOFS = (
    Proof("selector", "prot64", "8cc8", gpr_is_not(0, build_system("prot64", 3).seg[1].sel)),
    Proof("selector", "prot32", "8cd8", gpr_is_not(0, build_system("prot32", 3).seg[3].sel)),
    Proof("segment-load", "prot32", "8ed8", lambda _, o: o.exception is not None, load_of("prot32")),
    Proof("segment-load", "prot32", "9a006000002300", lambda _, o: o.pages[0xC][0x7FC] == 0x0F),
    Proof("tables", "prot64", "0f0107", lambda _, o: 8 in o.pages, {"rdi": 0x8000}),
    Proof("tables", "prot32", "0f02c8", lambda _, o: not o.rflags & 0x40, {"rax": 8, "flags": 0x40}),
    Proof("int-delivery", "prot64", "cd21", faults(13, 0x21 * 8 + 2, None)),
    Proof("int-delivery", "prot64", "cc", faults(3, None, None)),
    Proof("int-delivery", "prot64", "cd03", faults(3, None, None)),
    Proof("int-delivery", "compat16", "66cd04", faults(4, None, None)),
    Proof("int-delivery", "compat32", "ce", faults(4, None, None), {"flags": 0x800}),
    Proof("iopl", "prot64", "fa", GENERAL_PROTECTION, {"flags": IOPL3}),
    Proof("iopl", "prot64", "9d", lambda _, o: bool(o.rflags & IF), {"flags": IOPL3 | IF, "rsp": 0xC000}),
    Proof("flags-image", "prot64", "9c", pushes(b"\x02\x02\0\0"), {"flags": IOPL3}),
    Proof("ports", "prot32", "e480", GENERAL_PROTECTION, {"flags": IOPL3}),
    Proof("system-return", "prot64", "0f07", GENERAL_PROTECTION, {}, {"efer": 0x500}, "amd"),
    Proof("rep-loop", "prot64", "f2e110", ends_at(0x6003), {"flags": 0x40, "rcx": 5}, {}, "amd"),
    Proof("identity", "prot64", "0f31", GENERAL_PROTECTION),
    Proof("identity", "prot64", "0fa2", completes),
    Proof("features", "prot64", "f30faec0", completes),
    Proof("fpu-off", "prot64", "0f58c1", completes, {}, {"cr0": 0x8001003B}),
    Proof("fpu-off", "prot64", "0f58c1", completes, {}, {"cr4": 0x20}),
    Proof("fpu-image", "prot64", "0fae07", lambda _, o: any(o.pages[8][28:32]), {"rdi": 0x8000}),
    Proof("kernel-page", "prot64", "8b07", faults(14, 4, HIGH), IN_HIGH_PAGE),
    Proof("single-step", "prot64", "90", completes, {"flags": TF}),
    Proof("breakpoints", "prot64", "90", completes, system={"dr": ON_CODE}),
    Proof("breakpoints", "prot64", "8b06", completes, {"rsi": 0x8000},
          {"dr": (0, 0x8000, 0, 0, 0, 0, 0xFFFF0FF0, 0xF00408)}),
    Proof("undefined-flags", "compat32", "27", sets(0x800), {"rax": 0x6C, "flags": 0x641}),
    Proof("fpu-image-fault", "prot64", "0fae0f", faults(14, 4, 0xD00F),
          {"rdi": 0xCE10, "mem": Memory(((0xC000, b""),))}, {}, "amd"),
    Proof("fpu-image-fault", "compat32", "dd27", faults(14, 4, 0xD05F),
          {"rdi": 0xCFF4, "mem": Memory(((0xC000, b""),))}, {}, "amd"),
    Proof("popa-partial", "compat32", "61", lambda _, o: o.exception is not None and o.gpr[7] == 0x55555555,
          {"rsp": 0xCFF8, "mem": Memory(((0xCFF8, b"\x55" * 8),))}, {}, "amd"),
    Proof("vendor-push-segment", "compat32", "0e", faults(14, 6, 0xD000), {"rsp": 0xD001}, {}, "amd"),
    Proof("vendor-call-order", "prot64", "ff17", faults(14, 6, 0xB000), NOWHERE, {}, "amd"),
    Proof("vendor-prefetch-register", "prot64", "0f0dc8", faults(6, None, None), {}, {}, "amd"),
    Proof("vendor-canonical", "prot64", "648b07", GENERAL_PROTECTION, BELOW_BASE, FS_AT_THE_END, "amd"),
    Proof("vendor-near-branch", "prot64", "66eb10", ends_at(0x6013), {"rip": 0x46000}, {}, "amd"),
)
# fmt: on


def build(proof: Proof) -> Case:
    system = msgspec.structs.replace(build_system(proof.mode, 3), **proof.system)
    return build_case(proof.mode, bytes.fromhex(proof.code + "f4"), system=system, **proof.options)


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: f"{proof.gap}-{proof.code}")
def test_gap_is_still_there_and_known(native, proof):
    vendor = native.fingerprint()["vendor"]
    if proof.vendor and proof.vendor != vendor:
        pytest.skip(f"the processor is not one of {proof.vendor}")
    case = build(proof)
    outcome = native.run([case])[0]
    assert proof.wrong(case, outcome), outcome
    assert f"native-{proof.gap}" in {gap for _, gap in native.unchecked(case, outcome)}


def test_absent_pages_near_the_code_of_others(native):
    """Reads them; a case that runs alone does not."""
    base = build_case("prot64", b"\x90\xf4", cpl=3, mem=Memory(((0xC000, b""),)), rip=0x40000)
    others = [msgspec.structs.replace(base, rip=0x41000 + 32 * n) for n in range(SHARED_FROM)]
    reader = msgspec.structs.replace(
        base, code=bytes.fromhex("8b07f4"), gpr=(*base.gpr[:7], 0x41800, *base.gpr[8:])
    )
    outcome = native.run([reader, *others])[0]
    assert outcome.exception is None
    assert ("all", "native-other-code") in native.unchecked(reader, outcome)
    assert native.run([reader])[0].exception == (14, 4, 0x41800)


def test_system_calls_are_a_gap_of_their_own(native):
    case = build_case("prot64", b"\x0f\x05\xf4", cpl=3)
    outcome = native.run([case])[0]
    assert native.unchecked(case, outcome)[0] == ("all", "native-system-call")


@pytest.mark.parametrize("code", ["0f01fe", "f20f01fe", "f30f01ff", "660f01ff"])
def test_invlpgb_and_tlbsync_are_features_with_any_prefix(native, code):
    """Undefined where a processor does not have them, privileged where it has; decoders know no prefix."""
    case = build_case("prot32", bytes.fromhex(code + "f4"), cpl=3)
    outcome = native.run([case])[0]
    assert outcome.exception in {(6, None, None), (13, 0, None)}
    assert "native-features" in {gap for _, gap in native.unchecked(case, outcome)}


def test_every_gap_has_a_proof(native):
    proven = {f"native-{proof.gap}" for proof in PROOFS} | {"native-other-code", "native-system-call"}
    host = Host("amd", 0, 0, 0, "", frozenset())
    assert proven == {gap.id for gap in native_gaps(host)} | ATTACHED.keys()


PLAIN = (
    ("01d8", {}), ("8b07", {"rdi": 0x8000}), ("8907", {"rdi": 0x8000}), ("50", {}), ("9c", {"flags": IF}),
    ("9d", {"rsp": 0xC000}), ("f7f1", {}), ("f3aa", {"rdi": 0x8000, "rcx": 3}), ("0f58c1", {}), ("eb10", {}),
    ("e110", {}), ("0fa3d8", {}), ("8b07", {"rdi": 0xB000}), ("fa", {}), ("0f0b", {}), ("ce", {}),
)  # fmt: skip


@pytest.mark.parametrize(("code", "options"), PLAIN, ids=[row[0] for row in PLAIN])
@pytest.mark.parametrize("mode", ["compat32", "prot64"])
def test_plain_instructions_fall_into_no_gap(native, mode, code, options):
    case = build_case(mode, bytes.fromhex(code + "f4"), cpl=3, **options)
    assert native.unchecked(case, native.run([case])[0]) == ()


def test_vendor_gaps_are_about_the_other_vendor(native):
    vendor = native.fingerprint()["vendor"]
    case = msgspec.structs.replace(
        build_case("prot64", bytes.fromhex("66eb10f4"), cpl=3), vendor=vendor, rip=0x6000
    )
    assert "native-vendor-near-branch" not in {
        gap for _, gap in native.unchecked(case, native.run([case])[0])
    }


@pytest.mark.parametrize("dr7", [0x400, 0x402])
def test_breakpoints_that_are_off_or_elsewhere_are_no_gap(dr7):
    dr = (0x6001, 0, 0, 0, 0, 0, 0xFFFF0FF0, dr7)
    case = build_case("prot64", b"\x90", system=build_system("prot64", 3, dr=dr))
    (gap,) = [gap for gap in native_gaps(Host("amd", 0, 0, 0, "", frozenset())) if "breakpoints" in gap.id]
    assert not gap.applies(CaseInstruction(case), Outcome(case.id, case.gpr, case.rip, 2, case.system))
