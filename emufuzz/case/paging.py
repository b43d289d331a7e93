"""Identity page tables for cases with `phys` (SDM Vol. 3A 4.3 to 4.5): 2-level, PAE, 4-level."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

PTE_P: Final = 1 << 0
PTE_RW: Final = 1 << 1
PTE_US: Final = 1 << 2
PTE_A: Final = 1 << 5
PTE_D: Final = 1 << 6

#: Kind of paging -> (bytes per entry, address bits per level from the top, bits a directory entry sets).
_FORMS: Final = {
    "2-level": (4, (10, 10), PTE_P | PTE_RW | PTE_US | PTE_A),
    "pae": (8, (2, 9, 9), PTE_P | PTE_RW | PTE_US | PTE_A),
    "4-level": (8, (9, 9, 9, 9), PTE_P | PTE_RW | PTE_US | PTE_A),
}
_LEAF: Final = PTE_P | PTE_RW | PTE_A | PTE_D


def identity_tables(
    kind: str, root: int, pages: Iterable[int], *, user: bool = True
) -> tuple[tuple[int, bytes], ...]:
    """Page tables that map each linear page of `pages` (addresses) to the same physical address.

    Args:
        kind: "2-level" (CR4.PAE = 0), "pae" or "4-level" (IA-32e).
        root: physical address of the first table, page-aligned, for CR3; the others follow it.
        pages: linear addresses; in 4-level paging canonical, the physical address drops the sign.
        user: whether CPL 3 may use the pages.

    Returns:
        (physical address, contents) per table, `root` first.

    Raises:
        ValueError: an unknown kind, or a root that is not page-aligned.
    """
    if kind not in _FORMS:
        raise ValueError(f"{kind} is not one of {', '.join(_FORMS)}")
    if root & 0xFFF:
        raise ValueError(f"root {root:#x} is not page-aligned")
    tables = {root: bytearray(4096)}
    for page in pages:
        _map(kind, tables, root, page, _LEAF | (PTE_US if user else 0))
    return tuple((addr, bytes(table)) for addr, table in tables.items())


def _map(kind: str, tables: dict[int, bytearray], root: int, page: int, leaf: int) -> None:
    size, widths, directory = _FORMS[kind]
    address_bits = 12 + sum(widths)
    page &= (1 << address_bits) - 1 & ~0xFFF
    table, shift = root, address_bits
    for level, width in enumerate(widths):
        shift -= width
        offset = (page >> shift & (1 << width) - 1) * size
        entry = tables[table][offset : offset + size]
        if level == len(widths) - 1:
            _store(entry, page | leaf, tables[table], offset)
            return
        if not any(entry):
            new = root + 4096 * len(tables)
            tables[new] = bytearray(4096)
            # the four PDPTEs of PAE paging have no R/W, U/S and A bits (SDM Vol. 3A Table 4-8)
            flags = PTE_P if kind == "pae" and level == 0 else directory
            _store(entry, new | flags, tables[table], offset)
            table = new
        else:
            table = int.from_bytes(entry, "little") & ~0xFFF


def _store(entry: bytearray, value: int, table: bytearray, offset: int) -> None:
    table[offset : offset + len(entry)] = value.to_bytes(len(entry), "little")
