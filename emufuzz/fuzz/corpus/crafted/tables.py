"""Page tables whose entries may lead to tables as to pages: guests that map what they are mapped by."""

from __future__ import annotations

from random import Random
from typing import Final, NamedTuple

from emufuzz.arch import cr
from emufuzz.case.model import PAGE_SIZE
from emufuzz.case.paging import PTE_A, PTE_D, PTE_P, PTE_RW, PTE_US

ROOT: Final = 0x100000
_PS: Final = 1 << 7
_NX: Final = 1 << 63
_RIGHTS: Final = PTE_P | PTE_RW | PTE_US
#: Frames without memory; of a slot that is read-only; of the local APIC.
HOLE, READ_ONLY, APIC = 0xB0000, 0xD0000, 0xFEE00000
#: Frames of the pages' own, one after the other.
OWN: Final = 0x8000


class Kind(NamedTuple):
    """A kind of paging: bytes of an entry, and bits of the address that each level takes, from the top."""

    mode: str
    entry: int
    widths: tuple[int, ...]
    cr4: int


KINDS: Final = (
    Kind("prot32", 4, (10, 10), 0),
    Kind("prot32", 4, (10, 10), cr.X86_CR4_PSE),
    Kind("prot32", 8, (2, 9, 9), cr.X86_CR4_PAE),
    Kind("prot64", 8, (9, 9, 9, 9), cr.X86_CR4_PAE),
)


class Tables:
    """Tables for some linear pages, made first and filled in then.

    Attributes:
        frames: Physical address -> contents of each table, the root first.
        places: Linear page -> (table, offset) of the entry that maps it.
        directories: (table, offset, first linear address) of the entries that lead to those tables.
    """

    def __init__(self, kind: Kind, linear: tuple[int, ...], rng: Random) -> None:
        self._kind = kind
        self.frames = {ROOT: bytearray(PAGE_SIZE)}
        self.directories: list[tuple[int, int, int]] = []
        self.places = {page: self._place(page, rng) for page in linear}

    def _place(self, page: int, rng: Random) -> tuple[int, int]:
        shift, table, offset = 12 + sum(self._kind.widths), ROOT, 0
        for level, width in enumerate(self._kind.widths):
            shift -= width
            offset = (page >> shift & (1 << width) - 1) * self._kind.entry
            if shift == 12:
                break
            below = self.get(table, offset) & ~(PAGE_SIZE - 1)
            if not below:
                below = ROOT + PAGE_SIZE * len(self.frames)
                self.frames[below] = bytearray(PAGE_SIZE)
                # PDPTEs of PAE paging have no rights (SDM Vol. 3A Table 4-8)
                bare = self._kind.widths[0] == 2 and not level
                self.put(table, offset, below | (PTE_P if bare else _RIGHTS | rng.choice((PTE_A, 0))))
                if shift - self._kind.widths[-1] == 12:
                    self.directories.append((table, offset, page >> shift << shift))
            table = below
        return table, offset

    def get(self, table: int, offset: int) -> int:
        """An entry."""
        return int.from_bytes(self.frames[table][offset : offset + self._kind.entry], "little")

    def put(self, table: int, offset: int, value: int) -> None:
        """Store an entry, as many bits of it as there are."""
        size = self._kind.entry
        self.frames[table][offset : offset + size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")

    def fill(self, rng: Random, kept: tuple[int, ...]) -> None:
        """Give each page a frame: one of its own, a table's, or none; those `kept` their own."""
        strange = (*self.frames, *self.frames, HOLE, HOLE, READ_ONLY, APIC)
        for i, (page, place) in enumerate(self.places.items()):
            own = page in kept or rng.random() < 0.45
            value = OWN + PAGE_SIZE * i if own else rng.choice(strange)
            value |= _flags(rng) | (PTE_P if page in kept else 0)
            if len(self._kind.widths) > 3 and rng.random() < 0.1:
                value |= rng.choice((_NX, rng.getrandbits(4) << 59))
            self.put(*place, value)

    def bend(self, rng: Random) -> int | None:
        """A directory entry that leads to its own table, to another's, to a large page, or nowhere.

        Returns:
            The linear address of the entry itself, if it maps its own table.
        """
        table, offset, base = rng.choice(self.directories)
        kind = rng.randrange(8)
        if kind < 4:
            self.put(table, offset, table | _flags(rng))
            return base + offset // self._kind.entry * PAGE_SIZE + offset
        if kind < 6:
            value = self.get(*rng.choice(self.directories)[:2]) & ~0xFFF | _flags(rng)
        elif kind == 6:
            value = rng.choice((0, 1 << 21, 1 << 22, HOLE & ~0x3FFFFF)) | _flags(rng) | _PS
        else:
            value = self.get(table, offset) ^ rng.choice((PTE_P, PTE_RW, PTE_US, 1 << 51, 1 << 21, _PS))
        self.put(table, offset, value)
        return None

    def frame_of(self, page: int) -> int:
        """The frame that the last entry for a page has."""
        return self.get(*self.places[page]) & 0x000FFFFFFFFFF000


def _flags(rng: Random) -> int:
    """Of an entry: mostly all rights, accessed and dirty or not."""
    flags = _RIGHTS
    for bit, chance in ((PTE_A, 0.7), (PTE_D, 0.5)):
        flags |= bit if rng.random() < chance else 0
    if rng.random() < 0.15:
        flags ^= rng.choice((PTE_RW, PTE_RW, PTE_US, PTE_P))
    return flags
