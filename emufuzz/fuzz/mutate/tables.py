"""Page tables of cases with `phys`: entries on the way to what the instruction uses.

SDM Vol. 3A 4.3 "32-Bit Paging", 4.4 "PAE Paging", 4.5 "4-Level and 5-Level Paging".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from random import Random
from typing import Final, NamedTuple

from emufuzz.arch.cr import EFER_LMA, X86_CR0_PG, X86_CR4_LA57, X86_CR4_PAE
from emufuzz.arch.regs import VCPU_REGS_RDI, VCPU_REGS_RSI, VCPU_REGS_RSP, VCPU_SREG_DS, VCPU_SREG_SS
from emufuzz.case.model import Case, System, case_memory, code_address, is_physical
from emufuzz.case.paging import PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US
from emufuzz.fuzz.mutate.base import address_mask, physical_overlay
from emufuzz.fuzz.shrink.layout import effective_address, layout_of

_PS: Final = 1 << 7
_G: Final = 1 << 8
_NX: Final = 1 << 63
_FRAME64: Final = 0x000FFFFFFFFFF000
_FRAME32: Final = 0xFFFFF000
_RIGHTS: Final = (PTE_A, PTE_D, PTE_RW, PTE_US, PTE_P, PTE_A | PTE_D, PTE_RW | PTE_US)


class Entry(NamedTuple):
    """An entry of a page table: where it lies, its size in bytes, its value, and the level (1 = of pages)."""

    address: int
    size: int
    value: int
    level: int


def levels_of(system: System) -> tuple[tuple[int, int, int], ...]:
    """(lowest address bit, address bits, bytes per entry) per level from the root, as the state selects."""
    if system.efer & EFER_LMA:
        top = 5 if system.cr4 & X86_CR4_LA57 else 4
        return tuple((12 + 9 * level, 9, 8) for level in reversed(range(top)))
    if system.cr4 & X86_CR4_PAE:
        return ((30, 2, 8), (21, 9, 8), (12, 9, 8))
    return ((22, 10, 4), (12, 10, 4))


def entries_to(pages: Mapping[int, bytes], system: System, linear: int) -> Iterator[Entry]:
    """The entries on the way to a linear address, from the root down to one that leads nowhere."""
    levels = levels_of(system)
    table = system.cr3 & (0xFFFFFFE0 if len(levels) == 3 and levels[0][1] == 2 else _FRAME64)
    for i, (shift, width, size) in enumerate(levels):
        address = table + (linear >> shift & (1 << width) - 1) * size
        page = pages.get(address >> 12)
        if page is None:
            return
        value = int.from_bytes(page[address & 0xFFF : (address & 0xFFF) + size], "little")
        yield Entry(address, size, value, len(levels) - i)
        if not value & PTE_P or value & _PS:
            return
        table = value & (_FRAME64 if size == 8 else _FRAME32)


def _used(case: Case) -> list[int]:
    """Linear addresses that the instruction is likely to use."""
    flat = case.mode == "prot64"
    data = 0 if flat else case.system.seg[VCPU_SREG_DS].base
    stack = 0 if flat else case.system.seg[VCPU_SREG_SS].base
    used = [code_address(case), stack + case.gpr[VCPU_REGS_RSP], data + case.gpr[VCPU_REGS_RSI],
            data + case.gpr[VCPU_REGS_RDI]]  # fmt: skip
    layout = layout_of(case)
    if layout is not None and layout.is_memory(case.code):
        used += [data + effective_address(case, layout)] * 4
    return [address & address_mask(case) for address in used]


def other_page_table(case: Case, rng: Random) -> Case | None:
    """One entry changed: rights, flags, reserved bits, size, or where it leads."""
    if not is_physical(case) or not case.system.cr0 & X86_CR0_PG:
        return None
    pages = case_memory(case).pages
    entries = list(entries_to(pages, case.system, rng.choice(_used(case))))
    if not entries:
        return None
    entry = entries[-1] if rng.random() < 0.7 else rng.choice(entries)
    value = _changed(rng, entry, [other.address & ~0xFFF for other in entries])
    return physical_overlay(case, entry.address, value.to_bytes(entry.size, "little"))


def _changed(rng: Random, entry: Entry, tables: list[int]) -> int:
    value, wide = entry.value, entry.size == 8
    mask = (1 << 8 * entry.size) - 1
    frame = (_FRAME64 if wide else _FRAME32) & mask
    kind = rng.randrange(10)
    if kind < 4:
        value ^= rng.choice(_RIGHTS)
    elif kind == 4:
        value ^= 1 << rng.choice((51, 46, 40, 13)) if wide else _G
    elif kind == 5:
        value ^= _NX if wide else PTE_US
    elif kind == 6:
        value ^= _PS
    elif kind == 7:
        value = value & ~frame | rng.choice((*tables, 0x3000000, 0xD0000000, 0x8000)) & frame
    elif kind == 8:
        value ^= rng.getrandbits(4) << 59 if wide else 1 << rng.randrange(9)
    else:
        value ^= 1 << rng.randrange(8 * entry.size)
    return value & mask
