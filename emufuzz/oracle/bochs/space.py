"""Guest memory in Bochs: pages of one buffer, behind hidden page tables or at their own addresses.

Cases with flat linear memory run behind page tables that map exactly their pages, so that an access
to any other one is #PF, in every mode: Bochs translates in real mode, too, if CR0.PG is set. Cases
with physical memory, and those of instructions that show CR0.PG = 0, have each page at its own
physical address.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Mapping
from typing import Final

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE

#: Physical addresses of the hidden frames, but for while a case has physical addresses of its own.
WINDOW: Final = 0xE000_0000
FRAMES: Final = 8192

_FLAGS: Final = 0x63  # present, writable, accessed, dirty
_USER: Final = 4
_PRESENT: Final = 1

# fmt: off
#: Kind of paging -> (bytes per entry, shifts of the index into each table, mask of an index).
_KINDS: Final = {
    "2-level": (4, (22, 12),         0x3FF),
    "pae":     (8, (30, 21, 12),     0x1FF),
    "4-level": (8, (39, 30, 21, 12), 0x1FF),
}
# fmt: on


class SpaceFullError(Exception):
    """There are not enough frames left."""


class Frames:
    """The buffer in which all guest memory lies, and how much of it is taken."""

    def __init__(self) -> None:
        self.buffer = mmap.mmap(-1, FRAMES * PAGE_SIZE)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.buffer))
        self._next = 0

    @property
    def taken(self) -> int:
        """How many frames are taken; those are the first."""
        return self._next

    def take(self, count: int) -> int:
        """Offset of the first of `count` adjacent frames."""
        if self._next + count > FRAMES:
            raise SpaceFullError
        start = self._next
        self._next += count
        return start * PAGE_SIZE

    def give_back(self, offset: int) -> None:
        """Take back everything from `offset` on."""
        self._next = offset // PAGE_SIZE

    def reset(self) -> None:
        """Forget all of it."""
        self._next = 0


class Space:
    """The pages of a case in adjacent frames.

    Attributes:
        numbers: Page number -> offset of its frame in the buffer.
        start: Offset of the first frame.
        end: Offset behind the last.
        root: CR3 of the hidden tables, None without.
    """

    def __init__(
        self, frames: Frames, pages: Mapping[int, bytes], *, kind: str | None = None, user: bool = False
    ) -> None:
        """Lay the pages.

        Args:
            frames: Where they go.
            pages: Page number -> contents.
            kind: Of paging, if there are hidden tables: "2-level", "pae" or "4-level".
            user: The hidden pages are those of CPL 3.

        Raises:
            SpaceFullError: there are too few frames left.
        """
        self._buffer = frames.buffer
        ordered = sorted(pages)
        self.start = frames.take(len(ordered))
        self.end = self.start + len(ordered) * PAGE_SIZE
        self.numbers = {number: self.start + i * PAGE_SIZE for i, number in enumerate(ordered)}
        self.pristine = b"".join(pages[number] for number in ordered)
        self._buffer[self.start : self.end] = self.pristine
        self.root: int | None = None
        if kind is not None:
            self.root = _build_tables(frames, self.numbers, kind, _FLAGS | (_USER if user else 0))

    def lay(self, address: int, code: bytes) -> list[int]:
        """Write code; offsets of the frames in which it lies."""
        found, done = [], 0
        while done < len(code):
            frame = self.numbers[address + done >> PAGE_SHIFT]
            place = address + done & PAGE_MASK
            part = code[done : done + PAGE_SIZE - place]
            self._buffer[frame + place : frame + place + len(part)] = part
            found.append(frame)
            done += len(part)
        return found

    def pages_of(self, offsets: list[int]) -> list[int]:
        """Physical addresses of frames: their own with hidden tables, else those of the pages there."""
        if self.root is not None:
            return [WINDOW + offset for offset in offsets]
        return [number << PAGE_SHIFT for number, offset in self.numbers.items() if offset in offsets]

    def contents(self) -> bytes:
        """All pages as they are now."""
        return self._buffer[self.start : self.end]

    def changed(self, before: bytes, after: bytes) -> dict[int, bytes]:
        """The pages that differ."""
        found = {}
        for place, number in enumerate(self.numbers):
            part = slice(place * PAGE_SIZE, (place + 1) * PAGE_SIZE)
            if before[part] != after[part]:
                found[number] = after[part]
        return found

    def restore(self) -> None:
        """Put everything back as it was before the code was laid."""
        self._buffer[self.start : self.end] = self.pristine


def _build_tables(frames: Frames, numbers: Mapping[int, int], kind: str, flags: int) -> int:
    """Tables that map each page to its frame; the physical address of the root."""
    size, shifts, mask = _KINDS[kind]
    root = _new_table(frames)
    for number, frame in numbers.items():
        linear, table = number << PAGE_SHIFT, root
        for level, shift in enumerate(shifts[:-1]):
            place = table + (linear >> shift & mask) * size
            entry = int.from_bytes(frames.buffer[place : place + size], "little")
            if not entry:
                # PDPTEs of PAE paging have no rights (SDM Vol. 3A Table 4-8)
                rights = _PRESENT if kind == "pae" and level == 0 else _FLAGS | _USER
                entry = WINDOW + _new_table(frames) | rights
                frames.buffer[place : place + size] = entry.to_bytes(size, "little")
            table = (entry & ~PAGE_MASK) - WINDOW
        place = table + (linear >> shifts[-1] & mask) * size
        frames.buffer[place : place + size] = (WINDOW + frame | flags).to_bytes(size, "little")
    return WINDOW + root


def _new_table(frames: Frames) -> int:
    table = frames.take(1)
    frames.buffer[table : table + PAGE_SIZE] = bytes(PAGE_SIZE)
    return table
