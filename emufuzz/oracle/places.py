"""Where the bytes of an access end up: memory or a device, page by page; and what comes of accesses there.

For rules that work out what exactly KVM does where an operand lies in two pages, and one of them, or the
slot that it is in, is no memory.
"""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.arch.linear import linear_bits, sign_extended
from emufuzz.case.devices import devices_of, trace_to_obj
from emufuzz.case.fields import MAX_ACCESS
from emufuzz.case.model import (
    PAGE_MASK,
    PAGE_SHIFT,
    PAGE_SIZE,
    ZERO_PAGE,
    Case,
    Outcome,
    case_pages,
    is_physical,
)
from emufuzz.case.translate import translate
from emufuzz.oracle.device_trace import DEVICE_TRACE
from emufuzz.oracle.native_view import judge_case, kvm_of
from emufuzz.oracle.operands import place_of
from emufuzz.oracle.page_tables import READ_ONLY

_MASK64: Final = (1 << 64) - 1
#: A single-step trap, behind an instruction that has done its work.
TRAP: Final = (DB_VECTOR, None, None)


class Places:
    """Memory and devices of a case, and accesses to them in the order in which they are made.

    An access to what nothing maps raises KeyError.
    """

    def __init__(
        self, case: Case, changed: dict[int, bytes] | None = None, *, fresh_walks: bool = False
    ) -> None:
        """Start with the case's memory.

        Args:
            case: With or without a path.
            changed: Pages as something else has left them.
            fresh_walks: Walk page tables as the accesses before have left them.
        """
        self._view = judge_case(case)
        self._fresh = fresh_walks
        self._pages = case_pages(self._view)
        self._devices = devices_of(self._view)
        slots = kvm_of(case).get("memslots")
        self._slots = slots
        self.changed = {number: bytearray(page) for number, page in (changed or {}).items()}

    def _flags(self, number: int) -> int | None:
        """Flags of the slot of a page, None if it is in none."""
        address = number << PAGE_SHIFT
        slots = self._slots or ()
        found = (s.get("flags", 0) for s in slots if s["base"] <= address < s["base"] + s["size"])
        return next(found, None)

    def readable(self, number: int) -> bool:
        """Reads of a page get what is in memory."""
        return number in self._pages if self._slots is None else self._flags(number) is not None

    def writable(self, number: int) -> bool:
        """Writes to a page go to memory."""
        flags = self._flags(number)
        return number in self._pages if self._slots is None else flags is not None and not flags & READ_ONLY

    def _place(self, linear: int) -> int | None:
        if not self._fresh or not is_physical(self._view):
            return place_of(self._view, linear)
        system, memory = self._view.system, ChainMap[int, Any](self.changed, self._pages)
        return translate(memory, system.cr0, system.cr3, system.cr4, system.efer, linear)

    def _translated(self, linear: int) -> int:
        """The address that page tables translate: 48 bits lead there, or 57 (KVM: quirk 1)."""
        if self._view.mode != "prot64" or not is_physical(self._view):
            return linear
        return sign_extended(linear, linear_bits(self._view.system.cr4))

    def parts(self, linear: int, size: int) -> Iterator[tuple[int, int]]:
        """(physical address, bytes) of an access in each page that it reaches."""
        while size > 0:
            part = min(size, PAGE_SIZE - (linear & PAGE_MASK))
            place = self._place(self._translated(linear))
            if place is None:
                raise KeyError(linear)
            yield place, part
            linear, size = linear + part, size - part

    def read(self, linear: int, size: int) -> bytes:
        """What memory has, and devices answer, in pieces of at most 8."""
        data = b""
        for place, part in list(self.parts(linear, size)):
            number, offset = place >> PAGE_SHIFT, place & PAGE_MASK
            if self.readable(number):
                data += bytes(
                    (self.changed.get(number) or self._pages.get(number, ZERO_PAGE))[offset : offset + part]
                )
                continue
            for start in range(0, part, MAX_ACCESS):
                data += self._devices.mmio_read(place + start, min(part - start, MAX_ACCESS))
        return data

    def read_port(self, port: int, size: int, count: int) -> bytes:
        """So many reads of a port."""
        return self._devices.pio_in(port, size, count)

    def write(self, linear: int, data: bytes) -> None:
        """Store bytes in memory, or hand them to devices, in pieces of at most 8."""
        for place, part in list(self.parts(linear, len(data))):
            piece, data = data[:part], data[part:]
            number, offset = place >> PAGE_SHIFT, place & PAGE_MASK
            if self.writable(number):
                page = self.changed.setdefault(number, bytearray(self._pages.get(number, ZERO_PAGE)))
                page[offset : offset + part] = piece
                continue
            for start in range(0, part, MAX_ACCESS):
                self._devices.mmio_write(place + start, piece[start : start + MAX_ACCESS])

    def seen(self, outcome: Outcome) -> Outcome:
        """The outcome with what memory and devices have seen here."""
        pages = {number: bytes(page) for number, page in self.changed.items()}
        extra = {**(outcome.extra or {}), DEVICE_TRACE: trace_to_obj(self._devices.trace)}
        return msgspec.structs.replace(outcome, pages=pages, extra=extra)
