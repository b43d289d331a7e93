"""Cases cut down to the memory they use, so that a person can read them and a repository hold them."""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Case, Memory
from emufuzz.subject.flat import FlatSubject

#: Callbacks that touch memory: (name, linear address, bytes or their number, ...).
_TOUCHING: Final = frozenset(("read", "write", "cmpxchg"))


def trim(case: Case, watcher: FlatSubject) -> Case:
    """The case with only those pages, and of those only the bytes, that the emulator touches.

    `watcher` must log events. What another engine touches beyond that is lost, so the caller has
    to make sure that the shorter case still shows what it is kept for.
    """
    (outcome,) = watcher.run((case,))
    touched: dict[int, set[int]] = {}
    for event in outcome.events:
        if event[0] in _TOUCHING:
            size = event[2] if isinstance(event[2], int) else len(event[2])
            _touch(case, touched, event[1], size)
    entries = tuple(entry for pfn in sorted(touched) for entry in _entries(case, pfn, touched[pfn]))
    return msgspec.structs.replace(case, mem=Memory(entries))


def _touch(case: Case, touched: dict[int, set[int]], address: int, size: int) -> None:
    for at in range(address, address + size):
        pfn = at >> PAGE_SHIFT
        if pfn in case.mem.pages:
            touched.setdefault(pfn, set()).add(at & PAGE_MASK)


def _entries(case: Case, pfn: int, offsets: set[int]) -> list[tuple[int, bytes]]:
    """Runs of touched bytes of a page; one byte into the page suffices for it to exist."""
    page = case.mem.pages[pfn]
    runs: list[tuple[int, bytes]] = []
    start = previous = -2
    for offset in [*sorted(offsets), 2 * PAGE_SIZE]:
        if offset != previous + 1:
            if previous >= 0:
                runs.append(((pfn << PAGE_SHIFT) + start, page[start : previous + 1]))
            start = offset
        previous = offset
    return runs
