"""Guest memory: hidden page tables over one buffer of guest-physical memory.

A Case has flat linear memory in which only the listed pages exist. Page tables that the guest
never sees put each of them on a frame of the buffer, in every mode, real mode included: any linear
address works, an absent page raises a genuine #PF, a non-canonical address a genuine #GP. The
tables of an `AddressSpace` serve three kinds of paging at once (SDM Vol. 3A 4.4, 4.5): PAE and
4-level paging share the lower levels, 5-level paging adds a root when it is asked for.

Data pages are not executable, except in the exact mode of the oracle: a branch into data then
ends in a #PF at its target, which is cheap, where translating the data would not be.

Dirty bits tell which pages an instruction may have changed, so that the others need not be looked
at. They are reset with the contents; the TLB, which does not set a dirty bit twice, must then be
flushed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable
from typing import Final

from emufuzz.case.model import PAGE_SIZE, ZERO_PAGE

PTE_PRESENT: Final = 1 << 0
PTE_WRITE: Final = 1 << 1
PTE_USER: Final = 1 << 2
PTE_ACCESSED: Final = 1 << 5
PTE_DIRTY: Final = 1 << 6
PTE_NX: Final = 1 << 63

# Accessed is set beforehand. The walk that first writes to a data page sets its dirty bit.
CODE_PAGE: Final = PTE_PRESENT | PTE_USER | PTE_ACCESSED | PTE_DIRTY
EXECUTABLE_DATA_PAGE: Final = PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED
DATA_PAGE: Final = EXECUTABLE_DATA_PAGE | PTE_NX
_TABLE: Final = PTE_PRESENT | PTE_WRITE | PTE_USER | PTE_ACCESSED

MEMORY_SIZE: Final = 48 << 20
CODE_FRAMES: Final = range(PAGE_SIZE, 513 * PAGE_SIZE, PAGE_SIZE)
_POOL: Final = CODE_FRAMES.stop

#: Bytes between two page-table entries that are still looked at together.
_SPAN_GAP: Final = 64

#: Pages that one case may have: the rest of the buffer holds page tables.
MAX_PAGES: Final = 2048

_VPN_LOW_END: Final = 1 << 35  # page number where the low canonical half of 48 bits ends
_VPN_HIGH_START: Final = (1 << 52) - _VPN_LOW_END
_PUT_ENTRY: Final = struct.Struct("<Q").pack_into


class MemoryFullError(Exception):
    """The frame pool is used up; dropping all address spaces makes room."""


class FramePool:
    """Frames of the buffer, handed out in ascending order and taken back all at once."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self.buffer = buffer
        self.next = _POOL

    def take(self, count: int) -> int:
        """Physical address of `count` consecutive frames."""
        address = self.next
        if address + count * PAGE_SIZE > MEMORY_SIZE:
            raise MemoryFullError
        self.next = address + count * PAGE_SIZE
        return address

    def take_table(self) -> int:
        """Physical address of an empty page table."""
        address = self.take(1)
        self.buffer[address : address + PAGE_SIZE] = ZERO_PAGE
        return address

    def reset(self, mark: int = _POOL) -> None:
        """Take back every frame from `mark` on."""
        self.next = mark


class AddressSpace:
    """The pages of one Memory, with page tables, on consecutive frames.

    Attributes:
        watched: Where entries of pages lie together, and their bytes while nothing is written to.
        more_watched: The same of the other such places; mostly there are none.
        first: Physical address of the first page; the others follow in order of page number.
        last: Physical address behind the last page.
        original: Contents of all pages, in that order.
        code: Page number -> frame of the code pages mapped so far.
        cr3_pae: Root of PAE paging.
        cr3_long: Root of 4-level paging.
    """

    def __init__(self, pool: FramePool, pages: dict[int, bytes], data_attributes: int = DATA_PAGE) -> None:
        """Lay out `pages` (page number -> 4096 bytes).

        Raises:
            MemoryFullError: The pool has no room for them.
        """
        self._pool = pool
        self._tables: dict[tuple[int, int], int] = {}
        self.numbers = tuple(sorted(pages))
        self.first = pool.take(len(pages))
        self.last = self.first + len(pages) * PAGE_SIZE
        self.original = b"".join(pages[number] for number in self.numbers)
        self.code: dict[int, int] = {}
        self.cr3_long = pool.take_table()
        self.cr3_pae = self._table(3, 0)
        self._cr3_la57 = 0
        pool.buffer[self.first : self.last] = self.original
        #: Place of the page-table entry, physical address, page number and contents of each page.
        self._pages: list[tuple[int, int, int, bytes]] = []
        for index, number in enumerate(self.numbers):
            frame = self.first + index * PAGE_SIZE
            self._map(number, frame | data_attributes)
            entry = self._table(1, number >> 9) + (number & 511) * 8
            self._pages.append((entry, frame, number, pages[number]))
        self._link_root()
        self._watch()

    def _table(self, level: int, prefix: int) -> int:
        """The table of `level` (1 = of pages) for addresses that start with `prefix`."""
        address = self._tables.get((level, prefix))
        if address is None:
            address = self._tables[level, prefix] = self._pool.take_table()
        return address

    def _put(self, table: int, index: int, entry: int) -> None:
        _PUT_ENTRY(self._pool.buffer, table + (index & 511) * 8, entry)

    def _map(self, number: int, entry: int) -> None:
        self._put(self._table(1, number >> 9), number, entry)
        self._put(self._table(2, number >> 18), number >> 9, self._table(1, number >> 9) | _TABLE)
        self._put(self._table(3, number >> 27), number >> 18, self._table(2, number >> 18) | _TABLE)

    def _link_root(self) -> None:
        """Enter the third-level tables into the roots; 4-level paging sees 48-bit canonical ones."""
        for (level, prefix), address in list(self._tables.items()):
            number = prefix << 27
            if level == 3 and not _VPN_LOW_END <= number < _VPN_HIGH_START:
                self._put(self.cr3_long, prefix, address | _TABLE)
            if level == 3 and self._cr3_la57:
                fourth = self._table(4, prefix >> 9)
                self._put(fourth, prefix, address | _TABLE)
                self._put(self._cr3_la57, prefix >> 9, fourth | _TABLE)

    def _watch(self) -> None:
        """Note what the entries of all pages look like while nothing is written to."""
        buffer = self._pool.buffer
        places = sorted(page[0] for page in self._pages)
        spans: list[tuple[int, int]] = []
        for place in places:
            if spans and place - spans[-1][1] <= _SPAN_GAP:
                spans[-1] = (spans[-1][0], place + 8)
            else:
                spans.append((place, place + 8))
        watched = [(slice(start, end), buffer[start:end]) for start, end in spans or [(0, 0)]]
        self.watched, self.more_watched = watched[0], watched[1:]

    def written(self) -> bool:
        """Whether a page may have been written to since `changed_pages`, judging by its dirty bit."""
        buffer = self._pool.buffer
        return any(buffer[place] != clean for place, clean in (self.watched, *self.more_watched))

    def map_code(self, number: int, frame: int) -> None:
        """Add a code page, executable and read-only; no TLB remembers that it was absent."""
        self._map(number, frame | CODE_PAGE)
        self._link_root()
        self.code[number] = frame
        self._watch()

    def protect(self, numbers: Iterable[int]) -> None:
        """Make pages of this space read-only and executable."""
        for number in numbers:
            index = self.numbers.index(number)
            self._map(number, self.first + index * PAGE_SIZE | CODE_PAGE)
        self._watch()

    def cr3_la57(self) -> int:
        """Root of 5-level paging."""
        if not self._cr3_la57:
            self._cr3_la57 = self._pool.take_table()
            self._link_root()
        return self._cr3_la57

    def changed_pages(self) -> dict[int, bytes]:
        """Page number -> new contents of each changed page.

        The pages get back their contents and clean entries; the TLB must be flushed.
        """
        buffer = self._pool.buffer
        pages: dict[int, bytes] = {}
        for place, start, number, old in self._pages:
            entry = buffer[place]
            if not entry & PTE_DIRTY:
                continue
            buffer[place] = entry & ~PTE_DIRTY
            end = start + PAGE_SIZE
            new = buffer[start:end]
            if new != old:
                pages[number] = new
                buffer[start:end] = old
        return pages
