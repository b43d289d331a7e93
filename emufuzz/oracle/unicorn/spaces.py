"""Memory of cases with devices: which physical addresses are memory, and which a device answers.

Devices have no MMIO regions of Unicorn, whose pieces are no accesses of the guest: it cuts 8 bytes
into 2 x 4, reads aligned words around an unaligned operand and writes that byte by byte. Instead
there is memory where devices are; the hook that sees every access as the instruction makes it
puts a device's answer there before it is read.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final, Protocol

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, ZERO_PAGE, Case
from emufuzz.case.translate import translate
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import kvm_of
from emufuzz.oracle.unicorn.engine import Engine
from emufuzz.oracle.unicorn.memory import (
    EXECUTABLE_DATA_PAGE,
    MEMORY_SIZE,
    AddressSpace,
    FramePool,
)

_WINDOW: Final = MEMORY_SIZE >> PAGE_SHIFT
_READ_ONLY: Final = 2  # KVM_MEM_READONLY
#: Pages above the window that one case may use.
HIGH_PAGES: Final = 4096 + 256


class Slots:
    """Which guest-physical pages are memory: those of the case, or what `kvm.memslots` says."""

    def __init__(self, case: Case, pages: Mapping[int, bytes]) -> None:
        slots = kvm_of(case).get("memslots")
        self._given = slots is not None
        self._pages = pages
        self._slots: list[tuple[int, int, int]] = [
            (slot["base"] >> PAGE_SHIFT, slot["base"] + slot["size"] >> PAGE_SHIFT, slot.get("flags", 0))
            for slot in slots or ()
        ]

    def _flags(self, page: int) -> int | None:
        return next((flags for first, end, flags in self._slots if first <= page < end), None)

    def readable(self, page: int) -> bool:
        """Reads of a page get what is in memory."""
        return self._flags(page) is not None if self._given else page in self._pages

    def pages(self) -> Iterator[int]:
        """The numbers of the pages that slots make memory, whether the case fills them or not."""
        for first, end, _ in self._slots:
            yield from range(first, end)

    def writable(self, page: int) -> bool:
        """Writes to a page go to memory."""
        if not self._given:
            return page in self._pages
        flags = self._flags(page)
        return flags is not None and not flags & _READ_ONLY


class Space(Protocol):
    """The memory of a case with devices. Addresses are those of Unicorn's physical memory."""

    #: The case's code page was written to.
    code_written: bool
    #: An access to a device went over a page's end, nobody knows where to.
    lost: bool

    def device_address(self, address: int, *, write: bool) -> int | None:
        """The guest-physical address of an access that goes to a device, None if it goes to memory."""

    def following(self, address: int, size: int) -> int | None:
        """Where an access over a page's end goes on; None if nothing is mapped there."""

    def store(self, address: int, data: bytes) -> None:
        """Put a device's answer where it will be read."""

    def wrote(self, address: int) -> None:
        """The guest writes to memory."""

    def absent(self, address: int) -> bool:
        """Unicorn has no memory at an address; True if it has now."""


class LinearSpace(AddressSpace):
    """Flat linear memory and, under hidden page tables, a page for each page with devices."""

    def __init__(
        self, pool: FramePool, pages: Mapping[int, bytes], devices: Iterable[int], slots: Slots, bits: int
    ) -> None:
        """Linear addresses have 32 or 64 `bits`; what lies beyond them is out of reach."""
        empty = dict.fromkeys((*devices, *slots.pages()), ZERO_PAGE)
        numbers = (1 << bits - PAGE_SHIFT) - 1
        within = {number: page for number, page in {**empty, **pages}.items() if number <= numbers}
        super().__init__(pool, within, EXECUTABLE_DATA_PAGE)
        self.code_written = self.lost = False
        self._slots = slots
        self._numbers = numbers
        self._frames = {number: self.first + i * PAGE_SIZE for i, number in enumerate(self.numbers)}

    def device_address(self, address: int, *, write: bool) -> int | None:
        """See Space; a device's guest-physical address is its linear one."""
        place = address - self.first
        if not 0 <= place < self.last - self.first:
            return None
        number = self.numbers[place >> PAGE_SHIFT]
        memory = self._slots.writable(number) if write else self._slots.readable(number)
        return None if memory else number << PAGE_SHIFT | address & PAGE_MASK

    def following(self, address: int, size: int) -> int | None:  # noqa: ARG002 - one page further on
        """See Space."""
        number = self.numbers[address - self.first >> PAGE_SHIFT]
        return self._frames.get(number + 1 & self._numbers)

    def store(self, address: int, data: bytes) -> None:
        """See Space."""
        self._pool.buffer[address : address + len(data)] = data

    def wrote(self, address: int) -> None:
        """See Space; pages with code are read-only."""

    def absent(self, address: int) -> bool:  # noqa: ARG002 - the page tables lead to the buffer only
        """See Space."""
        return False

    def changed_pages(self) -> dict[int, bytes]:
        """Page number -> new contents of each changed page of memory."""
        pages = super().changed_pages()
        return {number: page for number, page in pages.items() if self._slots.writable(number)}


class PhysicalSpace(AddressSpace):
    """Guest-physical memory, in which the case's own page tables lie.

    Pages below the end of the engine's buffer lie there at their address, the others in the annex.
    """

    def __init__(
        self, pool: FramePool, annex: Annex, case: Case, pages: Mapping[int, bytes], slots: Slots
    ) -> None:
        """Nothing is in place before `enter`."""
        mark = pool.next
        super().__init__(pool, {})
        # Hidden tables are not used; their frames are the guest's.
        pool.buffer[mark : pool.next] = bytes(pool.next - mark)
        pool.reset(mark)
        self.code_written = self.lost = False
        self._annex = annex
        self._case = case
        self._memory = pages
        self._slots = slots
        self._code: frozenset[int] = frozenset()
        self._touched: set[int] = set()  # pages that do not belong to the case

    def enter(self, code: Iterable[int]) -> None:
        """Put all pages in place; those with code (physical page numbers) are watched."""
        self._code = frozenset(code)
        for number, page in self._memory.items():
            self.store(number << PAGE_SHIFT, page)

    def leave(self) -> None:
        """Take them away: what is not memory reads as zeros."""
        for number in (*self._memory, *self._touched):
            if number < _WINDOW:
                self._pool.buffer[number << PAGE_SHIFT : (number + 1) << PAGE_SHIFT] = ZERO_PAGE
        self._annex.clear()

    def device_address(self, address: int, *, write: bool) -> int | None:
        """See Space."""
        number = address >> PAGE_SHIFT
        if self._slots.writable(number) if write else self._slots.readable(number):
            return None
        return address

    def following(self, address: int, size: int) -> int | None:
        """See Space: the instruction's operands tell the linear address, the tables the rest."""
        boundary = next(iter(self._boundaries(address, size)), None)
        if boundary is None:
            self.lost |= self.device_address(address, write=False) is not None
            return None
        return self._translate(boundary)

    def _boundaries(self, address: int, size: int) -> Iterable[int]:
        """Linear page boundaries over which an operand goes from physical `address`."""
        before = PAGE_SIZE - (address & PAGE_MASK)
        mask = (1 << 64) - 1 if self._case.mode == "prot64" else 0xFFFFFFFF
        for access in CaseInstruction(self._case).accesses:
            end = access.linear + access.size
            for boundary in range((access.linear | PAGE_MASK) + 1, end, PAGE_SIZE):
                inside = boundary - before >= access.linear and boundary - before + size <= end
                if inside and self._translate(boundary - before & mask) == address:
                    yield boundary & mask

    def _translate(self, linear: int) -> int | None:
        system = self._case.system
        return translate(self._memory, system.cr0, system.cr3, system.cr4, system.efer, linear)

    def store(self, address: int, data: bytes) -> None:
        """See Space."""
        number = address >> PAGE_SHIFT
        if number not in self._memory:
            self._touched.add(number)
        if number < _WINDOW:
            self._pool.buffer[address : address + len(data)] = data
        else:
            self._annex.store(address, data)

    def wrote(self, address: int) -> None:
        """See Space."""
        number = address >> PAGE_SHIFT
        if number in self._code:
            self.code_written = True
        if number not in self._memory:
            self._touched.add(number)

    def absent(self, address: int) -> bool:
        """See Space."""
        return address >> PAGE_SHIFT >= _WINDOW and self._annex.provide(address >> PAGE_SHIFT)

    def _contents(self, number: int) -> bytes:
        if number < _WINDOW:
            return self._pool.buffer[number << PAGE_SHIFT : (number + 1) << PAGE_SHIFT]
        return self._annex.contents(number)

    def written(self) -> bool:
        """Tables are written to without a sign."""
        return True

    def changed_pages(self) -> dict[int, bytes]:
        """Physical page number -> new contents of each changed page of memory."""
        pages: dict[int, bytes] = {}
        for number in (*self._memory, *self._touched):
            new = self._contents(number)
            if new != self._memory.get(number, ZERO_PAGE) and self._slots.writable(number):
                pages[number] = new
        if self._code & pages.keys():
            self.code_written = True
        return pages


class Annex:
    """Physical pages above the end of the engine's buffer, there as long as a case needs them."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._buffer = mmap.mmap(-1, HIGH_PAGES * PAGE_SIZE)
        self._anchor: Any = ctypes.c_char.from_buffer(self._buffer)
        self._start = ctypes.addressof(self._anchor)
        self._places: dict[int, int] = {}

    def provide(self, number: int) -> bool:
        """Make a page exist; False if there are too many."""
        if number in self._places:
            return True
        if len(self._places) == HIGH_PAGES:
            return False
        place = len(self._places) * PAGE_SIZE
        self._buffer[place : place + PAGE_SIZE] = ZERO_PAGE
        self._engine.map_memory(number << PAGE_SHIFT, PAGE_SIZE, self._start + place)
        self._places[number] = place
        return True

    def store(self, address: int, data: bytes) -> None:
        """Write to a page, which exists then."""
        if self.provide(address >> PAGE_SHIFT):
            place = self._places[address >> PAGE_SHIFT] + (address & PAGE_MASK)
            self._buffer[place : place + len(data)] = data

    def contents(self, number: int) -> bytes:
        """A page's bytes; zeros if it does not exist."""
        place = self._places.get(number)
        return ZERO_PAGE if place is None else self._buffer[place : place + PAGE_SIZE]

    def clear(self) -> None:
        """No page exists any more."""
        for number in self._places:
            self._engine.unmap_memory(number << PAGE_SHIFT, PAGE_SIZE)
        self._places.clear()
