"""Cases cut down to the memory they use, so that a person can read them and a repository hold them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import msgspec

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Case, Memory, is_physical
from emufuzz.subject.flat import FlatSubject

#: Callbacks that touch memory: (name, linear address, bytes or their number, ...).
_TOUCHING: Final = frozenset(("read", "write", "cmpxchg"))
_WORTH_TRYING: Final = 40


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


def trim_pages(case: Case, shows: Callable[[Case], bool]) -> Case:
    """The case without those entries of its `mem` or `phys` without which it still shows what it shall.

    For cases that more than the emulator looks at: `shows` runs each candidate. Nothing is taken
    away from a case with more entries than are worth trying.
    """
    physical = is_physical(case)
    entries = list((case.extra or {})["phys"] if physical else case.mem.entries)
    if len(entries) > _WORTH_TRYING:
        return case
    for entry in list(entries):
        rest = [other for other in entries if other is not entry]
        shorter = _with_entries(case, rest)
        if shows(shorter):
            case, entries = shorter, rest
    return case


def _with_entries(case: Case, entries: list[Any]) -> Case:
    if is_physical(case):
        return msgspec.structs.replace(case, extra={**(case.extra or {}), "phys": entries})
    return msgspec.structs.replace(case, mem=Memory(tuple(entries)))
