"""What a comparison must know of an instruction's operands: their size, their place, the shift count.

Read from the bytes of the case, independently of the emulator's decoder.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from emufuzz.arch.leaves import LEAVES
from emufuzz.arch.regs import GPR_NAMES, VCPU_REGS_RCX, VCPU_REGS_RDI, VCPU_REGS_RSI, VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_DF
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    ZERO_PAGE,
    Case,
    Outcome,
    case_memory,
    case_pages,
    is_physical,
    memory_changes,
)
from emufuzz.case.translate import translate

#: Accessed and dirty, in the first byte of a table entry.
_WALK_BITS: Final = 0x60
_LEGACY: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_SEGMENTS: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65))


def at_iteration(case: Case, number: int, size: int) -> Case:
    """A repeated string instruction of `size`-byte elements at one iteration, its last; the first is 0."""
    way = -size if case.rflags & X86_EFLAGS_DF else size
    gpr = list(case.gpr)
    gpr[VCPU_REGS_RCX] = 1
    for register in (VCPU_REGS_RSI, VCPU_REGS_RDI):
        gpr[register] += number * way
    return msgspec.structs.replace(case, gpr=tuple(gpr))


class PrefixFacts(NamedTuple):
    """The prefixes of an instruction (SDM Vol. 2A 2.1.1, 2.2.1)."""

    length: int
    small_op: bool
    small_ad: bool
    rex: int
    rep: int
    lock: bool
    segments: tuple[int, ...]


def prefix_facts(case: Case) -> PrefixFacts:
    """The prefixes in front of the opcode; a REX byte counts only directly before it."""
    return _prefix_facts(case.code[:15], case.mode == "prot64")


def _prefix_facts(code: bytes, long_mode: bool) -> PrefixFacts:
    small_op = small_ad = lock = False
    rex = rep = length = 0
    segments: list[int] = []
    for byte in code:
        if long_mode and byte & 0xF0 == 0x40:
            rex = byte
        elif byte in _LEGACY:
            rex = 0
            small_op |= byte == 0x66
            small_ad |= byte == 0x67
            lock |= byte == 0xF0
            if byte in (0xF2, 0xF3):
                rep = byte
            elif byte in _SEGMENTS:
                segments.append(byte)
        else:
            break
        length += 1
    return PrefixFacts(length, small_op, small_ad, rex, rep, lock, tuple(segments))


def default_bits(case: Case) -> int:
    """16 or 32: the operand size that CS gives outside 64-bit mode, and 32 in it."""
    if case.mode == "prot64" or case.system.seg[VCPU_SREG_CS].db:
        return 32
    return 16


def operand_size(case: Case, leaf: str) -> int:
    """Operand size in bytes of an instruction without a fixed one (SDM Vol. 1 3.6.1)."""
    row = LEAVES.get(leaf)
    if row is not None and "ByteOp" in row.flags:
        return 1
    prefixes = prefix_facts(case)
    if prefixes.rex & 8:
        return 8
    return 2 if prefixes.small_op == (default_bits(case) == 32) else 4


def shift_count(case: Case, subject: Outcome) -> int | None:
    """The count of a shift or rotate before masking; None if the leaf is no shift by CL or imm8."""
    row = LEAVES.get(subject.leaf)
    if row is None:
        return None
    if row.src2 == "CL":
        return case.gpr[VCPU_REGS_RCX] & 0xFF
    if row.src2 == "One":
        return 1
    if row.src2 == "ImmByte" and subject.length:
        return case.code[subject.length - 1]
    return None


def modrm(case: Case) -> tuple[int, int, int]:
    """(mod, reg, rm) of an instruction with a ModRM byte, extended by REX.R and REX.B."""
    prefixes = prefix_facts(case)
    at = prefixes.length
    at += 3 if case.code[at : at + 2] == b"\x0f\x38" else 2 if case.code[at] == 0x0F else 1
    byte = case.code[at]
    rex = prefixes.rex
    return byte >> 6, byte >> 3 & 7 | (rex & 4) << 1, byte & 7 | (rex & 1) << 3


def destination(case: Case, leaf: str) -> str:
    """The field that holds the destination of BSF, BSR, BSWAP, SHLD or SHRD: a GPR's name or `mem`."""
    row = LEAVES[leaf]
    if "ModRM" not in row.flags:
        return GPR_NAMES[row.opcode & 7 | (prefix_facts(case).rex & 1) << 3]
    mod, reg, rm = modrm(case)
    if row.dst == "Reg":
        return GPR_NAMES[reg]
    return GPR_NAMES[rm] if mod == 3 else "mem"


def place_of(case: Case, linear: int) -> int | None:
    """Where a linear address lies in the memory that an outcome shows: physical with `phys`."""
    if not is_physical(case):
        return linear
    system = case.system
    return translate(case_memory(case).pages, system.cr0, system.cr3, system.cr4, system.efer, linear)


def changed_bytes(case: Case, outcome: Outcome) -> dict[int, int]:
    """Address -> new value of every byte that an instruction changed.

    In physical memory the first byte of an entry in which only accessed and dirty bits were set does
    not count.
    """
    changed = {at + i: byte for at, data in memory_changes(case, outcome) for i, byte in enumerate(data)}
    if not is_physical(case):
        return changed
    pages = case_pages(case)

    def walked(at: int, byte: int) -> bool:
        old = pages.get(at >> PAGE_SHIFT, ZERO_PAGE)[at & PAGE_MASK]
        return not at & 3 and byte & ~_WALK_BITS == old & ~_WALK_BITS and byte & old == old

    return {at: byte for at, byte in changed.items() if not walked(at, byte)}
