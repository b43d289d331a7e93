"""The SDM's flag effects as this table states them, against those that iced-x86 states."""

from __future__ import annotations

import re

import pytest
from iced_x86 import Decoder, RflagsBits

from emufuzz.arch.effects import ANY_COUNT, EFFECTS, undefined_flags, undefined_flags_exact
from emufuzz.arch.leaves import LEAVES, LeafRow
from emufuzz.arch.rflags import (
    X86_EFLAGS_AC,
    X86_EFLAGS_AF,
    X86_EFLAGS_CF,
    X86_EFLAGS_DF,
    X86_EFLAGS_IF,
    X86_EFLAGS_OF,
    X86_EFLAGS_PF,
    X86_EFLAGS_SF,
    X86_EFLAGS_ZF,
)

BITS = {
    RflagsBits.OF: X86_EFLAGS_OF,
    RflagsBits.SF: X86_EFLAGS_SF,
    RflagsBits.ZF: X86_EFLAGS_ZF,
    RflagsBits.AF: X86_EFLAGS_AF,
    RflagsBits.CF: X86_EFLAGS_CF,
    RflagsBits.PF: X86_EFLAGS_PF,
    RflagsBits.DF: X86_EFLAGS_DF,
    RflagsBits.IF: X86_EFLAGS_IF,
    RflagsBits.AC: X86_EFLAGS_AC,
}
KNOWN = sum(BITS.values())
PREFIXES = {"pfx_66": b"\x66", "pfx_f2": b"\xf2", "pfx_f3": b"\xf3"}
MAPS = {"1byte": b"", "0f": b"\x0f", "0f38": b"\x0f\x38"}

# Disagreements: leaf -> (reason, {what: flags that differ}). They are checked to be there.
BEYOND_WIDTH = (
    "iced calls CF defined at every count; the SDM (SAL/SAR/SHL/SHR) only below the operand's width",
    {"written": X86_EFLAGS_CF, "undefined": X86_EFLAGS_CF},
)
NO_INT = (
    "iced gives INT no effects; the SDM clears IF and AC or lets the gate decide",
    {"written": X86_EFLAGS_IF | X86_EFLAGS_AC},
)
EXPECTED = {
    **dict.fromkeys(("c0/4", "c0/5", "c0/6", "d2/4", "d2/5", "d2/6"), BEYOND_WIDTH),
    **dict.fromkeys(("cc", "cd", "ce"), NO_INT),
}


def modrm_of(row: LeafRow) -> int:
    whole = re.search(r"modrm=(\w\w)", row.selector)
    if whole:
        return int(whole[1], 16)
    digit, rm = re.search(r"/(\d)", row.selector), re.search(r"rm=(\d)", row.selector)
    register = rm or "mod3" in row.selector or "NoMod" in row.flags
    return (0xC0 if register else 0) | (int(digit[1]) if digit else 0) << 3 | (int(rm[1]) if rm else 3)


def encode(row: LeafRow, immediate: int) -> bytes:
    prefix = b"".join(byte for name, byte in PREFIXES.items() if name in row.selector)
    modrm = bytes([modrm_of(row)]) if "ModRM" in row.flags else b""
    return prefix + MAPS[row.map] + bytes([row.opcode]) + modrm + bytes([immediate]) + bytes(10)


def decode(row: LeafRow, immediate: int):
    only_32 = "No64" in row.flags or "mode!64" in row.selector
    inc_dec = row.map == "1byte" and row.opcode & 0xF0 == 0x40  # REX prefixes in 64-bit mode
    decoder = Decoder(32 if only_32 or inc_dec else 64, encode(row, immediate))
    return decoder.decode()


def from_iced(bits: int) -> int:
    return sum(flag for bit, flag in BITS.items() if bits & bit)


def differences(leaf: str, immediate: int) -> dict[str, int]:
    row, effects, insn = LEAVES[leaf], EFFECTS[leaf], decode(LEAVES[leaf], immediate)
    assert not insn.is_invalid
    undefined = undefined_flags_exact(leaf, 4, immediate if row.src2 == "ImmByte" else ANY_COUNT)
    ours = {
        "read": effects.tested,
        "written": effects.modified & ~undefined,
        "cleared": effects.cleared,
        "set": effects.set,
        "undefined": undefined,
    }
    differ = {name: ours[name] & KNOWN ^ from_iced(getattr(insn, f"rflags_{name}")) for name in ours}
    return {name: mask for name, mask in differ.items() if mask}


@pytest.mark.parametrize("leaf", sorted(EFFECTS))
def test_agrees_with_iced_but_for_the_listed_disagreements(leaf):
    assert differences(leaf, 0x11) == EXPECTED.get(leaf, ("", {}))[1]


@pytest.mark.parametrize("leaf", sorted(leaf for leaf in EFFECTS if LEAVES[leaf].src2 == "ImmByte"))
def test_agrees_with_iced_about_a_shift_by_one(leaf):
    assert not differences(leaf, 1)


@pytest.mark.parametrize("leaf", sorted(leaf for leaf in EFFECTS if EFFECTS[leaf].by_count))
def test_a_count_of_0_has_no_effects_for_iced_either(leaf):
    row = LEAVES[leaf]
    if row.src2 == "ImmByte":
        insn = decode(row, 0)
        assert insn.rflags_modified == insn.rflags_undefined == 0
    assert undefined_flags_exact(leaf, 4, 0) == (undefined_flags(leaf) if row.src2 == "One" else 0)
