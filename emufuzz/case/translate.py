"""Where a linear address of a case with `phys` lies in physical memory (SDM Vol. 3A 4.3 to 4.5).

A look at the tables, not an access: neither rights nor reserved bits are checked, and no accessed
bit is set. It says where a case's code is laid, and where an access that Unicorn reports goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from emufuzz.arch.cr import EFER_LMA, X86_CR0_PG, X86_CR4_LA57, X86_CR4_PAE, X86_CR4_PSE

_P: Final = 1 << 0
_PS: Final = 1 << 7
_FRAME32: Final = 0xFFFFF000
_FRAME64: Final = 0x000FFFFFFFFFF000
_FRAME_CR3_PAE: Final = 0xFFFFFFE0
_PAGE: Final = 0xFFF


def translate(pages: Mapping[int, bytes], cr0: int, cr3: int, cr4: int, efer: int, linear: int) -> int | None:
    """The physical address of `linear`, None if nothing maps it.

    Args:
        pages: Physical memory, page number -> 4096 bytes.
        cr0: CR0.PG decides whether there is paging at all.
        cr3: The root of the tables.
        cr4: PAE, PSE and LA57 decide on their form.
        efer: EFER.LMA, too.
        linear: 64 bits, canonical; outside IA-32e mode only the low 32 bits count.
    """
    return walk(pages, cr0, cr3, cr4, efer, linear)[1]


def walk(
    pages: Mapping[int, bytes], cr0: int, cr3: int, cr4: int, efer: int, linear: int
) -> tuple[list[int], int | None]:
    """The table entries on the way, from the root down to the first that is not present, and `translate`."""
    if not cr0 & X86_CR0_PG:
        return [], linear
    if efer & EFER_LMA:
        levels = 5 if cr4 & X86_CR4_LA57 else 4
        bits = 12 + 9 * levels
        if linear >> bits - 1 not in {0, (1 << 65 - bits) - 1}:
            return [], None
        return _walk(pages, cr3 & _FRAME64, linear, levels)
    linear &= 0xFFFFFFFF
    if not cr4 & X86_CR4_PAE:
        return _walk_32(pages, cr3, cr4, linear)
    pdpte = _entry(pages, (cr3 & _FRAME_CR3_PAE) + (linear >> 30) * 8, 8)
    if not pdpte & _P:
        return [pdpte], None
    entries, physical = _walk(pages, pdpte & _FRAME64, linear, 2)
    return [pdpte, *entries], physical


def _walk(pages: Mapping[int, bytes], table: int, linear: int, levels: int) -> tuple[list[int], int | None]:
    """Through tables of 512 entries, from the one of `levels` (1 = of pages) down."""
    entries: list[int] = []
    for level in range(levels, 0, -1):
        shift = 3 + 9 * level
        entry = _entry(pages, table + (linear >> shift & 0x1FF) * 8, 8)
        entries.append(entry)
        if not entry & _P:
            break
        if level == 1 or (level <= 3 and entry & _PS):
            offset = (1 << shift) - 1
            return entries, entry & _FRAME64 & ~offset | linear & offset
        table = entry & _FRAME64
    return entries, None


def _walk_32(pages: Mapping[int, bytes], cr3: int, cr4: int, linear: int) -> tuple[list[int], int | None]:
    """32-bit paging; a 4 MiB page has its address bits 39:32 in bits 20:13 of the entry."""
    pde = _entry(pages, (cr3 & _FRAME32) + (linear >> 22) * 4, 4)
    if not pde & _P:
        return [pde], None
    if pde & _PS and cr4 & X86_CR4_PSE:
        return [pde], (pde >> 13 & 0xFF) << 32 | pde & 0xFFC00000 | linear & 0x3FFFFF
    pte = _entry(pages, (pde & _FRAME32) + (linear >> 12 & 0x3FF) * 4, 4)
    return [pde, pte], pte & _FRAME32 | linear & _PAGE if pte & _P else None


def _entry(pages: Mapping[int, bytes], address: int, size: int) -> int:
    """A table entry; 0, not present, where there is no memory."""
    page = pages.get(address >> 12)
    offset = address & _PAGE
    return int.from_bytes(page[offset : offset + size], "little") if page else 0
