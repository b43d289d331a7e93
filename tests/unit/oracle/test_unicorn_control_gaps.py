"""Proof tests of the ledger's entries for control registers: each fails once Unicorn has lost the gap."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.oracle.unicorn.gaps_control import CONTROL_GAPS

NON_CANONICAL = 0x8000_0000_0000
OSXSAVE = 0x6A0 | 1 << 18
RAX, RCX, RDX, RSP, RDI = 0, 1, 2, 4, 7


def completes(_case, outcome):
    return outcome.exception is None


def undefined(_case, outcome):
    return outcome.exception == (6, None, None)


def privileged(_case, outcome):
    return outcome.exception == (13, 0, None)


# fmt: off
#: (gap, mode, code, general registers, state, what Unicorn does wrong)
PROOFS = (
    ("cr-validity", "prot64", "0f22c0", {RAX: 1 << 31}, {}, completes),
    ("cr-validity", "prot64", "0f22c0", {RAX: 0xA0000011}, {}, completes),
    ("cr-validity", "prot64", "0f22c0", {RAX: 0x80000091}, {}, lambda _c, o: o.system.cr0 == 0x80000091),
    ("cr-validity", "prot32", "0f22c0", {RAX: 0x11}, {"efer": 0x100}, completes),
    ("cr-validity", "prot64", "0f22d8", {RAX: 1 << 60}, {}, completes),
    ("cr-validity", "prot64", "0f22e0", {RAX: 0}, {}, completes),
    ("cr-validity", "prot64", "0f22e0", {RAX: 1 << 31 | 0x20}, {}, completes),
    ("cr-validity", "prot32", "0f22e0", {RAX: 1 << 17}, {}, completes),
    ("cr-privilege-first", "prot64", "440f22d4", {}, {"cpl": 3}, lambda _c, o: o.exception == (13, 0, None)),
    ("cr-privilege-first", "prot32", "0f20c8", {}, {"cpl": 1}, lambda _c, o: o.exception == (13, 0, None)),
    ("cr-privilege-first", "prot64", "440f23c9", {}, {"cpl": 3}, lambda _c, o: o.exception == (13, 0, None)),
    ("fence-prefix", "prot64", "660fae1f", {RDI: 0x8000}, {}, completes),
    ("fence-prefix", "prot32", "f20fae1f", {RDI: 0x1000}, {"cpl": 3}, lambda _c, o: o.exception[0] == 14),
    ("fence-prefix", "prot64", "660faeff", {}, {"cpl": 3}, completes),
    ("fence-prefix", "prot32", "f30faef0", {}, {}, completes),
    ("fence-prefix", "prot64", "f20faee8", {}, {}, completes),
    ("cr8", "prot64", "440f20c0", {}, {"cr8": 5}, lambda _c, o: o.gpr[RAX] == 0),
    ("dr-validity", "prot64", "0f21f8", {}, {"dr": (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x2400)}, completes),
    ("dr-validity", "prot64", "0f23f0", {RAX: 1 << 32}, {}, completes),
    ("dr-validity", "prot64", "0f23f0", {RAX: 1 << 12}, {}, lambda _c, o: o.system.dr[6] == 0xFFFF1FF0),
    ("dr-validity", "prot64", "0f23f8", {RAX: 0xD000}, {}, lambda _c, o: o.system.dr[7] == 0xD400),
    ("msr-validity", "prot64", "0f32", {RCX: 0x12345678}, {}, completes),
    ("msr-validity", "prot64", "0f30", {RCX: 0xC0000082, RDX: 0x8000}, {"msr": ((0xC0000082, 0),)},
     completes),
    ("msr-validity", "prot64", "0f30", {RCX: 0xC0000080, RAX: 0x10}, {}, completes),
    ("msr-validity", "prot64", "0f30", {RCX: 0x277, RAX: 2}, {"msr": ((0x277, 0),)}, completes),
    ("msr-validity", "prot64", "0f30", {RCX: 0x174, RAX: 0x12345}, {"msr": ((0x174, 0),)},
     lambda _c, o: o.system.msr == ((0x174, 0x2345),)),
    ("smsw32", "prot32", "0f01e0", {RAX: 0x55555555}, {}, lambda _c, o: o.gpr[RAX] == 0x55550011),
    ("rdpmc", "prot64", "0f33", {}, {}, undefined),
    ("cpuid", "prot64", "0fa2", {}, {}, lambda _c, o: o.gpr[3] == int.from_bytes(b"Genu", "little")),
    ("time-stamp", "prot64", "0f31", {}, {}, lambda _c, o: o.gpr[RAX] != 0),
    ("processor-number", "prot64", "f30fc7f8", {}, {}, undefined),
    ("processor-number", "prot64", "0f01f9", {RCX: 7}, {}, lambda _c, o: o.gpr[RCX] == 0),
    ("random", "prot64", "0fc7f8", {}, {}, lambda c, o: o.exception or o.gpr != c.gpr),
    ("xcr0-features", "prot64", "0f01d1", {RAX: 5}, {"cr4": OSXSAVE}, completes),
    ("xcr0-features", "prot64", "0f01d1", {RAX: 0x203}, {"cr4": OSXSAVE}, completes),
    ("syscall", "prot32", "0f34", {}, {}, completes),
    ("syscall", "real", "0f05", {}, {}, completes),
    ("system-return", "prot64", "0f35", {}, {}, lambda _c, o: o.exception == (13, 0, None)),
    ("system-return", "compat32", "0f07", {}, {"cpl": 3, "efer": 0x501}, privileged),
    ("system-return", "prot64", "480f35", {RDX: NON_CANONICAL}, {"msr": ((0x174, 8),)}, completes),
    ("sysexit32", "prot64", "0f35", {RDX: 1 << 40}, {"msr": ((0x174, 8),)}, lambda _c, o: o.rip == 1 << 40),
    ("sysexit64", "prot64", "480f35", {}, {"msr": ((0x174, 8),)}, lambda _c, o: o.system.seg[1].db == 1),
)
# fmt: on


@pytest.mark.parametrize("proof", PROOFS, ids=lambda proof: f"{proof[0]}-{proof[2]}")
def test_gap_is_still_there_and_known(oracle, case, proof):
    gap, mode, code, gpr, state, wrong = proof
    built = case(mode, code + "f4", gpr, **state)
    outcome = oracle.run([built])[0]
    assert wrong(built, outcome), outcome
    assert f"unicorn-{gap}" in {found for _, found in oracle.unchecked(built, outcome)}


def test_every_gap_has_a_proof():
    assert {f"unicorn-{proof[0]}" for proof in PROOFS} == {gap.id for gap in CONTROL_GAPS}


JUDGED = (
    ("prot64", "0f22d8", {}, {"cpl": 3}),
    ("prot64", "0faee8", {}, {}),
    ("prot64", "0fae1f", {RDI: 0x8000}, {}),
    ("prot64", "0f23c8", {}, {"cpl": 3}),
    ("prot64", "0f20c0", {}, {}),
    ("prot64", "0f22c0", {RAX: 0x80000033}, {}),
    ("prot64", "0f22d8", {RAX: 0x123000}, {}),
    ("prot64", "0f22e0", {RAX: 0x20}, {}),
    ("prot64", "0f21f0", {}, {}),
    ("prot64", "0f23c0", {RAX: 0x1234}, {}),
    ("prot64", "0f32", {RCX: 0xC0000080}, {}),
    ("prot64", "0f30", {RCX: 0xC0000082, RAX: 0x1000}, {"msr": ((0xC0000082, 0),)}),
    ("prot64", "0f30", {RCX: 0x12345678}, {"cpl": 3}),
    ("prot64", "0f01d1", {RAX: 3}, {"cr4": OSXSAVE}),
    ("prot64", "0f01d0", {}, {"cr4": OSXSAVE}),
    ("prot64", "0f31", {}, {"cpl": 3, "cr4": 0x6A4}),
    ("prot32", "ec", {}, {}),
    ("prot32", "0f01e0", {}, {"cpl": 3}),
)


@pytest.mark.parametrize(("mode", "code", "gpr", "state"), JUDGED)
def test_what_is_checked_falls_into_no_gap(oracle, case, mode, code, gpr, state):
    built = case(mode, code + "f4", gpr, **state)
    found = oracle.unchecked(built, oracle.run([built])[0])
    assert [gap for field, gap in found if field == "all"] == [] or code == "0f01e0"


def test_an_msr_of_an_earlier_case_is_not_one_of_the_next(oracle, case):
    write = case("prot64", "0f30", {RCX: 0xC0000082, RAX: 0x1000}, msr=((0xC0000082, 0),))
    read = msgspec.structs.replace(
        case("prot64", "0f32", {RCX: 0xC0000082}, msr=((0xC0000082, 7),)), rip=write.rip + 64
    )
    written, value = oracle.run([write, read])
    assert written.system.msr == ((0xC0000082, 0x1000),)
    assert value.gpr[RAX] == 7
