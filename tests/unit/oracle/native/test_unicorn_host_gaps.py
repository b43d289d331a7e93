"""Proof tests of what a processor showed Unicorn to get wrong: each fails once Unicorn gets it right."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import DEFAULT_FPU, Case, Fpu, Memory, Outcome
from emufuzz.oracle.gaps import find_gaps
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.unicorn.gaps_host import HOST_GAPS

ONES = Fpu(xmm=((1 << 128) - 1,) * 16)
ONE_THIRD = Fpu(xmm=(0x3F800000, 0x40400000, *[0] * 14))
#: Doubles: SQRTSD keeps the upper half of XMM0, SQRTPD does not.
HIGH_HALF = Fpu(xmm=(7 << 64, 0, *[0] * 14))
ROOT_OF_ONE = Fpu(xmm=(0, 0x3F800000, *[0] * 14))
#: The last bytes below the addresses that are not canonical.
LOW = (1 << 47) - 4
END = (14, 4, 0xFFFFFFFE)


@dataclasses.dataclass(frozen=True)
class Proof:
    """A case on which processor and Unicorn differ in `field`, and what Unicorn has there."""

    gap: str
    mode: str
    code: str
    field: str
    wrong: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    fpu: Fpu = DEFAULT_FPU
    wide_stack: int | None = None


# fmt: off
PROOFS = (
    Proof("enter-probe", "prot32", "c8001000", "exception", None, {"rsp": 0xC800}),
    Proof("enter-frame", "prot16", "66c8000000", "rbp", 0x5678C7FC, {"rsp": 0x1234C800, "rbp": 0x56780000}),
    Proof("enter-frame", "prot64", "66c8000000", "rbp", 0xC7FE, {"rbp": 0x56780000}),
    Proof("vector-store-partial", "prot64", "0f1107", "stored", b"\xff" * 8, {"rdi": 0xAFF8}, ONES),
    Proof("mmx-fault-any", "prot64", "0ffd07", "ftw", 0xFF, {"rdi": 0xB000}),
    Proof("mmx-tags", "prot64", "0f3800c1", "ftw", 0),
    Proof("mmx-tags", "prot64", "0f2a07", "ftw", 0xFF, {"rdi": 0x8000}),
    Proof("vector-undefined", "prot64", "66f30ff907", "exception", (14, 4, 0xB000), {"rdi": 0xB000}),
    Proof("vector-undefined", "prot64", "0f5007", "exception", None, {"rdi": 0x8000}),
    Proof("vector-prefix-pair", "prot64", "66f20f51c1", "xmm0 high", 0, {}, HIGH_HALF),
    Proof("mask-move", "prot64", "0ff7c1", "exception", None, {"rdi": 0xB000}),
    Proof("undefined-reads", "prot64", "0fba1f00", "exception", (14, 4, 0xB000), {"rdi": 0xB000}),
    Proof("undefined-reads", "prot64", "0fba1f00", "exception", (13, 0, None), {"rdi": 1 << 63}),
    Proof("noncanonical-split", "prot64", "488b07", "exception", (14, 4, LOW), {"rdi": LOW}),
    Proof("popa-order", "prot16", "61", "exception", (14, 4, 0xD001), {"rsp": 0xCFF9}),
    Proof("approximation", "prot64", "0f52c1", "xmm0", 0x3F800000, {}, ROOT_OF_ONE),
    Proof("compare-predicate", "prot64", "0fc2c1ff", "exception", (6, None, None)),
    Proof("operand-size-16", "prot16", "f30fb8c3", "rax", 16, {"rbx": 0xFFFF0000}),
    Proof("noncanonical-override", "prot64", "268b4500", "exception", (13, 0, None), {"rbp": 1 << 63}),
    Proof("wrap-end", "compat16", "66c9", "exception", END, {"rbp": 0xFFFFFFFE}, DEFAULT_FPU, 1),
    Proof("vector-flags", "prot64", "f30f5ec1", "mxcsr", 0x1F80, {}, ONE_THIRD),
    Proof("prefetch-register", "prot64", "0f18c3", "exception", (6, None, None)),
    Proof("movbe-register", "prot64", "0f38f0ff", "exception", (14, 4, 0xB000), {"rdi": 0xB000}),
)
# fmt: on


@pytest.fixture(scope="module")
def unicorn() -> Iterator[UnicornOracle]:
    opened = UnicornOracle()
    yield opened
    opened.close()


def build(proof: Proof) -> Case:
    system = build_system(proof.mode, 3, fpu=proof.fpu)
    if proof.wide_stack is not None:
        seg = list(system.seg)
        seg[2] = msgspec.structs.replace(seg[2], db=proof.wide_stack)
        system = msgspec.structs.replace(system, seg=tuple(seg))
    return build_case(proof.mode, bytes.fromhex(proof.code + "f4"), system=system, **proof.options)


def value(outcome: Outcome, field: str) -> Any:
    fpu = outcome.system.fpu
    values = {
        "exception": outcome.exception,
        "rax": outcome.gpr[0],
        "rbp": outcome.gpr[5],
        "ftw": fpu.ftw,
        "mxcsr": fpu.mxcsr,
        "xmm0": fpu.xmm[0] & 0xFFFFFFFF,
        "xmm0 high": fpu.xmm[0] >> 64,
        "stored": outcome.pages.get(0xA, bytes(4096))[0xFF8:],
    }
    return values[field]


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: f"{proof.gap}-{proof.code}")
def test_gap_is_still_there_and_known(unicorn, native, proof):
    case = build(proof)
    theirs, hosts = unicorn.run([case])[0], native.run([case])[0]
    assert value(theirs, proof.field) == proof.wrong
    assert value(hosts, proof.field) != proof.wrong
    assert f"unicorn-{proof.gap}" in {gap for _, gap in find_gaps(HOST_GAPS, case, theirs)}


def test_every_gap_has_a_proof():
    assert {f"unicorn-{proof.gap}" for proof in PROOFS} == {gap.id for gap in HOST_GAPS}


PLAIN = (
    "01d8", "8b07", "50", "c9", "0f10c1", "0f6fc1", "61", "0fbae001", "660f38f007", "f30fb8c3", "0f1807",
    "0f23c8", "0f22d8", "0fae1f", "0faee8", "660fae3f",
)  # fmt: skip


@pytest.mark.parametrize("code", PLAIN)
def test_plain_instructions_fall_into_no_gap(unicorn, code):
    mem = Memory(((0x8000, b""), (0xC000, b"")))
    case = build_case("prot32", bytes.fromhex(code + "f4"), cpl=3, rdi=0x8000, rbp=0xC800, mem=mem)
    outcome = unicorn.run([case])[0]
    gaps = {gap for _, gap in find_gaps(HOST_GAPS, case, outcome)}
    assert not gaps
