"""Operands: boundary values in registers and memory, and addresses that meet the edges of things.

Edges are those of segments, pages, the canonical halves, devices and memslots: the places at which an
access is split, refused or sent elsewhere (SDM Vol. 3A 5.3, 3.3.7.1).
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any, Final

import msgspec

from emufuzz.arch import rflags
from emufuzz.arch.regs import (
    VCPU_REGS_RBP,
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RSI,
    VCPU_REGS_RSP,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_SS,
)
from emufuzz.case.model import Case, is_physical
from emufuzz.case.values import boundary
from emufuzz.fuzz.encode import effect_of
from emufuzz.fuzz.mutate.base import MASK32, MASK64, address_mask, code_bits, overlay, with_register
from emufuzz.fuzz.shrink.layout import Layout, effective_address, layout_of
from emufuzz.fuzz.values import boundary_bytes

_CANONICAL: Final = (0x7FFFFFFFFFFF, 0x800000000000, 0xFFFF7FFFFFFFFFFF, 0xFFFF800000000000, MASK64, 0)
_WRAPS: Final = (0, 0xFFFF, 0x10000, 0x7FFFFFFF, MASK32)
_COUNTS: Final = (0, 1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65)
#: Iterations of REP beyond this only cost time; one in so many mutants has them all the same.
_MOST_REPEATS: Final = 96
_LONG_RUNS: Final = 256
_STRINGS: Final = frozenset((*range(0x6C, 0x70), *range(0xA4, 0xA8), *range(0xAA, 0xB0)))
_REPEATS: Final = (b"\xf2", b"\xf3")


def other_registers(case: Case, rng: Random) -> Case:
    """Boundary values, or values near the old ones, in one to three registers."""
    long = case.mode == "prot64"
    gpr = list(case.gpr)
    for _ in range(rng.randrange(1, 4)):
        nr = rng.randrange(16 if long else 8)
        kind = rng.randrange(4)
        if kind == 0:
            gpr[nr] = gpr[nr] + rng.choice((1, -1, 2, -2, 4, 8, -8))
        elif kind == 1:
            gpr[nr] ^= 1 << rng.randrange(64 if long else 32)
        else:
            gpr[nr] = boundary(rng, 64 if long else 32)
    mask = address_mask(case)
    return msgspec.structs.replace(case, gpr=tuple([value & mask for value in gpr]))


def copied_register(case: Case, rng: Random) -> Case:
    """One register has another's value, or its complement: equal operands, opposite signs."""
    nr, other = rng.randrange(8), rng.randrange(8)
    value = case.gpr[other]
    return with_register(case, nr, rng.choice((value, value, ~value, -value)))


def other_flags(case: Case, rng: Random) -> Case:
    """One or two flags inverted: status flags, DF, IF, IOPL, NT, AC, ID, seldom RF."""
    flags = case.rflags
    for _ in range(rng.randrange(1, 3)):
        flags ^= 1 << rng.choice((0, 0, 2, 4, 6, 7, 11, 9, 10, 12, 13, 14, 18, 21, 16))
    return msgspec.structs.replace(case, rflags=flags | rflags.X86_EFLAGS_FIXED)


def small_count(case: Case, rng: Random) -> Case:
    """A count of shifts, repetitions or loops."""
    return with_register(case, VCPU_REGS_RCX, rng.choice(_COUNTS))


# -- addresses -----------------------------------------------------------------------------------


def page_edges(case: Case) -> Iterator[int]:
    """Linear addresses at which the case's memory starts and ends; none with `phys`."""
    if not is_physical(case):
        for pfn in case.mem.pages:
            yield pfn << 12
            yield (pfn + 1) << 12


def device_edges(case: Case) -> Iterator[int]:
    """Guest-physical addresses at which MMIO devices and memslots start and end."""
    extra = case.extra or {}
    for device in extra.get("devices", ()):
        if device["kind"] == "mmio":
            start = _number(device["addr"])
            yield start
            yield start + device["size"]
    for slot in (extra.get("kvm") or {}).get("memslots", ()):
        yield slot["base"]
        yield slot["base"] + slot["size"]


def _number(value: Any) -> int:
    return value if isinstance(value, int) else int(value, 16)


def edge_address(case: Case, rng: Random, sreg: int) -> int:
    """An effective address in a segment at, or just before, the edge of something."""
    seg = case.system.seg[sreg]
    base = 0 if case.mode == "prot64" and sreg < 4 else seg.base
    kind = rng.randrange(8)
    before = rng.choice((0, 0, 1, 2, 3, 4, 6, 7, 8, 15, 16))
    if kind == 0:
        return seg.limit + 1 - before
    if kind == 1:
        return rng.choice(_CANONICAL if case.mode == "prot64" else _WRAPS) - before
    edges = list(device_edges(case) if case.path and kind & 1 else page_edges(case))
    if not edges or kind == 2:
        return rng.choice((0x8000, 0x9000, 0xC000, 0x40000)) + rng.getrandbits(11) - base
    edge = rng.choice(edges) - base
    return edge - before if kind < 6 else edge + rng.getrandbits(11)


def aimed_operand(case: Case, rng: Random) -> Case | None:
    """The memory operand of the first instruction at an edge; by a register, else by its displacement."""
    layout = layout_of(case)
    if layout is None or not layout.is_memory(case.code):
        return None
    prefixes = effect_of(code_bits(case), case.code[layout.start : layout.opcode])
    base = _registers(case, layout)[0]
    default = VCPU_SREG_SS if base in (VCPU_REGS_RSP, VCPU_REGS_RBP) else VCPU_SREG_DS
    return solved(case, layout, edge_address(case, rng, prefixes.seg if prefixes.seg >= 0 else default))


def at_same_place(old: Case, new: Case) -> Case:
    """`new`, whose instruction is another one, with its operand in memory where that of `old` was."""
    before, after = layout_of(old), layout_of(new)
    if before is None or after is None or not before.is_memory(old.code):
        return new
    target = effective_address(old, before)
    if after.is_memory(new.code):
        return solved(new, after, target) or new
    if _STRINGS & set(new.code[after.opcode : after.opcode + 1]):
        nr = VCPU_REGS_RDI if target & 1 else VCPU_REGS_RSI
        return with_register(new, nr, target)
    return new


def solved(case: Case, layout: Layout, target: int) -> Case | None:
    """The case with its memory operand at an effective address, as far as its registers can do that."""
    base, index, shift = _registers(case, layout)
    change = target - effective_address(case, layout)
    mask = (1 << 8 * layout.ad_bytes) - 1
    if base >= 0:
        step = change // (1 + (1 << shift)) if base == index else change
        return _moved(case, base, step, mask)
    if index >= 0:
        return _moved(case, index, change >> shift, mask)
    return _displaced(case, layout, change)


def _moved(case: Case, nr: int, change: int, mask: int) -> Case:
    old = case.gpr[nr]
    return with_register(case, nr, old & ~mask | old + change & mask)


def _displaced(case: Case, layout: Layout, change: int) -> Case | None:
    size = layout.imm - layout.disp
    if not size:
        return None
    value = int.from_bytes(case.code[layout.disp : layout.imm], "little") + change & (1 << 8 * size) - 1
    code = case.code[: layout.disp] + value.to_bytes(size, "little") + case.code[layout.imm :]
    return msgspec.structs.replace(case, code=code)


_PAIRS16: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (6, -1), (7, -1), (5, -1), (3, -1))


def _registers(case: Case, layout: Layout) -> tuple[int, int, int]:
    """Base, index (-1 = none) and shift of the memory operand (SDM Vol. 2A tables 2-1 to 2-3)."""
    modrm = case.code[layout.modrm]
    mod, rm = modrm >> 6, modrm & 7
    if layout.ad_bytes == 2:
        return (-1, -1, 0) if not mod and rm == 6 else (*_PAIRS16[rm], 0)
    if layout.sib < 0:
        return (-1, -1, 0) if not mod and rm == 5 else (rm | (layout.rex & 1) << 3, -1, 0)
    sib = case.code[layout.sib]
    index = sib >> 3 & 7 | (layout.rex & 2) << 2
    base = -1 if not mod and sib & 7 == 5 else sib & 7 | (layout.rex & 1) << 3
    return base, -1 if index == 4 else index, sib >> 6


def aimed_strings(case: Case, rng: Random) -> Case:
    """RSI and RDI, which string instructions use, at edges."""
    for nr, sreg in ((VCPU_REGS_RSI, VCPU_SREG_DS), (VCPU_REGS_RDI, VCPU_SREG_ES)):
        if rng.getrandbits(1):
            case = with_register(case, nr, edge_address(case, rng, sreg) & address_mask(case))
    return case


def aimed_stack(case: Case, rng: Random) -> Case:
    """RSP, and RBP one in two times, at an edge."""
    target = edge_address(case, rng, VCPU_SREG_SS) & address_mask(case)
    case = with_register(case, VCPU_REGS_RSP, target)
    return with_register(case, VCPU_REGS_RBP, target + 8 * rng.getrandbits(4)) if rng.getrandbits(1) else case


def other_memory(case: Case, rng: Random) -> Case | None:
    """Other bytes where the operand, the stack or the strings are."""
    data = boundary_bytes(rng, rng.choice((1, 2, 4, 8, 16)))
    layout = layout_of(case)
    places = [(case.gpr[VCPU_REGS_RSP], VCPU_SREG_SS), (case.gpr[VCPU_REGS_RSI], VCPU_SREG_DS)]
    if layout is not None and layout.is_memory(case.code):
        places = [(effective_address(case, layout), VCPU_SREG_DS)] * 4 + places
    address, sreg = rng.choice(places)
    base = 0 if case.mode == "prot64" else case.system.seg[sreg].base
    return overlay(case, base + address, data)


def tamed(case: Case, rng: Random) -> Case:
    """The case with fewer repetitions, if its code repeats a string instruction very often."""
    count = case.gpr[VCPU_REGS_RCX] & address_mask(case)
    if count <= _MOST_REPEATS or not any(prefix in case.code for prefix in _REPEATS):
        return case
    if not _STRINGS & set(case.code) or not rng.randrange(_LONG_RUNS):
        return case
    return with_register(case, VCPU_REGS_RCX, rng.choice(_COUNTS))
