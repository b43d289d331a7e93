"""Passes over memory: no paging, fewer and shorter entries, fewer bytes that are not 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from emufuzz.arch import cr
from emufuzz.case.build import LONG_MODES
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Case, Memory, case_memory, is_physical
from emufuzz.fuzz.shrink.bits import smaller
from emufuzz.fuzz.shrink.fields import Key, case_of, parts_of, sorted_entries, with_parts
from emufuzz.fuzz.shrink.probe import Probe
from emufuzz.fuzz.shrink.reduce import reduced
from emufuzz.subject.flat import FlatSubject

#: Callbacks that touch memory: (name, linear address, bytes or their number, ...).
_TOUCHING: Final = frozenset(("read", "write", "cmpxchg"))
#: Bytes of an entry that are worth being looked at one by one.
_WORTH_TRYING: Final = 256
#: Bytes that are one number.
_NUMBER: Final = 16


def without_paging(case: Case, probe: Probe) -> Case:
    """Flat memory instead of page tables, or paging off where the mode can do without."""
    if not is_physical(case):
        return case
    extra = {name: value for name, value in (case.extra or {}).items() if name != "phys"}
    memory = Memory(tuple(sorted_entries(case_memory(case))))
    flat = msgspec.structs.replace(case, extra=extra or None, mem=memory)
    if probe.keeps(flat):
        return flat
    off = with_parts(case, {("cr0",): case.system.cr0 & ~(cr.X86_CR0_PG | cr.X86_CR0_WP)})
    return off if case.mode not in LONG_MODES and off != case and probe.keeps(off) else case


def less_memory(case: Case, probe: Probe) -> Case:
    """Entries of memory that are as short as possible, and of whose bytes few are not 0."""
    if not is_physical(case) and any(len(data) > 1 for _, data in case.mem.entries):
        touched = trim(case, FlatSubject(events=True))
        if len(touched.mem.entries) <= len(case.mem.entries) and touched != case and probe.keeps(touched):
            case = touched
    for key in [key for key in parts_of(case) if key[0] in ("mem", "phys")]:
        case = _narrowed(case, key, probe)
    return case


def _narrowed(case: Case, key: Key, probe: Probe) -> Case:
    """The case with one entry shortened from both ends, and emptied if the page alone matters."""
    parts = parts_of(case)
    addr, data = int(key[1]), parts.pop(key)

    def with_entry(addr: int, data: bytes) -> Case:
        return case_of(case, parts | {(key[0], addr): data})

    page = addr & ~PAGE_MASK
    in_one_page = addr + len(data) - 1 <= page | PAGE_MASK
    if (addr, data) != (page, b"") and in_one_page and probe.keeps(with_entry(page, b"")):
        return with_entry(page, b"")
    size = len(data) // 2
    while size:
        if size < len(data) and probe.keeps(with_entry(addr + size, data[size:])):
            addr, data = addr + size, data[size:]
        elif size < len(data) and probe.keeps(with_entry(addr, data[:-size])):
            data = data[:-size]
        else:
            size //= 2
    return with_entry(addr, _plainer(data, lambda other: probe.keeps(with_entry(addr, other))))


def _plainer(data: bytes, works: Callable[[bytes], bool]) -> bytes:
    """The same number of bytes, most of them 0; short ones are made simple as a number."""
    places = [i for i, byte in enumerate(data) if byte]
    if len(places) > _WORTH_TRYING:
        return data

    def only(kept: list[int]) -> bytes:
        chosen = frozenset(kept)
        return bytes(byte if i in chosen else 0 for i, byte in enumerate(data))

    plain = only(reduced(places, lambda kept: len(kept) < len(places) and works(only(kept))))
    if len(plain) > _NUMBER or not any(plain):
        return plain

    def of_number(number: int) -> bytes:
        return number.to_bytes(len(plain), "little")

    number = smaller(int.from_bytes(plain, "little"), 0, lambda value: works(of_number(value)))
    return of_number(number)


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
