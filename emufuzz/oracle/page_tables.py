"""A case's page tables in a form that can be walked and changed, to make another case of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final

from emufuzz.arch.cr import EFER_LMA, X86_CR4_LA57, X86_CR4_PAE
from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.case.devices import devices_of
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Case, case_pages

_P, _RW, _US, _A, _D, _PS = 1, 2, 4, 0x20, 0x40, 0x80
_FRAME: Final = 0x000FFFFFFFFFF000
#: What an entry says beside an address: P, RW, US, A, and NX.
_RIGHTS: Final = 1 << 63 | _P | _RW | _US | _A
#: Whose pages are split into pages of 4 KiB.
_LARGEST_TABLE: Final = 2
_USER: Final = 3
#: KVM_MEM_READONLY.
READ_ONLY: Final = 2
#: Where page numbers that nobody uses are looked for.
_FREE: Final = 0x200


class Tables:
    """A case's page tables in a form that can be changed; `pages` are all pages of physical memory."""

    def __init__(self, case: Case) -> None:
        system = case.system
        self.pages = {number: bytearray(page) for number, page in case_pages(case).items()}
        self.changed: dict[int, bytes] = {}
        self.added: list[int] = []
        used = self.pages.keys() | devices_of(case).page_numbers() | _slot_pages(case)
        self._free = (number for number in range(_FREE, 1 << 20) if number not in used)
        self._long = bool(system.efer & EFER_LMA)
        self._wide = self._long or bool(system.cr4 & X86_CR4_PAE)
        self._root = system.cr3
        self._levels = (5 if system.cr4 & X86_CR4_LA57 else 4) if self._long else 3 if self._wide else 2
        self._size, self._bits = (8, 9) if self._wide else (4, 10)
        self._user = system.seg[VCPU_SREG_SS].dpl == _USER

    def places(self, linear: int) -> Iterator[tuple[int, int]]:
        """(level, physical address) of the entries that translate an address, as far as they are present."""
        table = self._root & (_FRAME if self._long or not self._wide else 0xFFFFFFE0)
        for level in range(self._levels, 0, -1):
            shift = PAGE_SHIFT + self._bits * (level - 1)
            place = table + (linear >> shift & (1 << self._bits) - 1) * self._size
            yield level, place
            entry = self.entry(place)
            if not entry & _P or (level > 1 and self._is_page(level, entry)):
                return
            table = entry & _FRAME

    def is_top(self, level: int) -> bool:
        """A PDPTE of PAE paging, which has neither rights nor walk bits (SDM Vol. 3A 4.4.1)."""
        return self._wide and not self._long and level == self._levels

    def _is_page(self, level: int, entry: int) -> bool:
        return bool(entry & _PS) and level in ((2, 3) if self._long else (2,))

    def entry(self, place: int) -> int:
        """The entry at a physical address; 0 where there is no memory."""
        page = self.pages.get(place >> PAGE_SHIFT, b"")
        return int.from_bytes(page[place & PAGE_MASK : (place & PAGE_MASK) + self._size], "little")

    def _store(self, place: int, entry: int) -> None:
        self.changed[place] = data = entry.to_bytes(self._size, "little")
        self.pages[place >> PAGE_SHIFT][place & PAGE_MASK : (place & PAGE_MASK) + self._size] = data

    def new_page(self, data: bytes = bytes(PAGE_SIZE)) -> int:
        """The number of a page that nobody has used, with contents."""
        number = next(self._free)
        self.pages[number] = bytearray(data)
        self.added.append(number)
        return number

    def map(self, linear: int, frame: int) -> None:
        """Map the page of an address, writable and for the privilege level; no walk bit is left to set."""
        leaf = frame << PAGE_SHIFT | _P | _RW | _A | _D | (_US if self._user else 0)
        done: set[int] = set()
        while True:
            level, place = next(at for at in self.places(linear) if at[0] not in done)
            done.add(level)
            if level == 1:
                self._store(place, leaf)
                return
            entry = self.entry(place)
            if entry & _P and self._is_page(level, entry):
                entry = self.new_page(self._split(level, entry)) << PAGE_SHIFT | entry & _RIGHTS
            elif not entry & _P or (entry & _FRAME) >> PAGE_SHIFT not in self.pages:
                entry = self.new_page() << PAGE_SHIFT | _P
            top = self.is_top(level)
            self._store(place, entry if top else entry | _RW | _US | _A)

    def _split(self, level: int, entry: int) -> bytes:
        """The table of smaller pages that is the same as a large page."""
        small = entry if level > _LARGEST_TABLE else entry & ~_PS
        step = PAGE_SIZE << self._bits * (level - 2)
        first = small & ~(_FRAME & (step << self._bits) - 1)
        return b"".join(
            (first + number * step).to_bytes(self._size, "little") for number in range(1 << self._bits)
        )

    def pages_added(self) -> dict[int, bytes]:
        """Physical address -> contents of what is new: pages, and entries elsewhere."""
        return {number << PAGE_SHIFT: bytes(self.pages[number]) for number in self.added} | self.changed


def walked(case: Case, linears: Iterable[int]) -> Iterator[tuple[int, bytes]]:
    """Where walks to addresses set accessed bits, and the bytes with them (SDM Vol. 3A 4.8)."""
    tables = Tables(case)
    for linear in linears:
        for level, place in tables.places(linear):
            byte = tables.entry(place) & 0xFF
            if byte & _P and not tables.is_top(level):
                yield place, bytes((byte | _A,))


def _slot_pages(case: Case) -> set[int]:
    return {
        number
        for slot in _kvm(case).get("memslots") or ()
        for number in range(slot["base"] >> PAGE_SHIFT, slot["base"] + slot["size"] >> PAGE_SHIFT)
    }


def _kvm(case: Case) -> dict[str, Any]:
    fields: dict[str, Any] = (case.extra or {}).get("kvm") or {}
    return fields


def with_tables(case: Case, tables: Tables, read_only: int | None = None) -> dict[str, Any]:
    """`Case.extra` with what `tables` adds; new pages are memory also where the case lists its slots.

    Args:
        case: With physical memory.
        tables: Made of the case, and changed.
        read_only: The new page whose slot is read-only.
    """
    extra: dict[str, Any] = dict(case.extra or {})
    entries = ({"addr": hex(at), "data": data.hex()} for at, data in tables.pages_added().items())
    extra["phys"] = [*extra["phys"], *entries]
    if _kvm(case).get("memslots") is not None:
        slots = [
            {
                "base": number << PAGE_SHIFT,
                "size": PAGE_SIZE,
                "flags": READ_ONLY if number == read_only else 0,
            }
            for number in tables.added
        ]
        extra["kvm"] = {**extra["kvm"], "memslots": [*extra["kvm"]["memslots"], *slots]}
    return extra
