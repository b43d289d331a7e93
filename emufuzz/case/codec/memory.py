"""Guest memory: as what is left and what is added of a memory that has a number, page by page.

A page is empty, or a few runs of bytes in zeros, or a page of the arena with a few patches. How many
pages there may be grows with the length of the encoded case, so that a short one never takes long.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Final, NamedTuple

from emufuzz.arch.modes import MODES
from emufuzz.case.codec.stream import Source, number
from emufuzz.case.codec.templates import MEMORIES, SEEDS, USUAL_SEED, memory_of
from emufuzz.case.fields import MAX_ENTRIES, MAX_MEMORY
from emufuzz.case.model import PAGE_SHIFT, PAGE_SIZE, Memory

Entry = tuple[int, bytes]

_EMPTY, _SPARSE, _ARENA, _OTHER_ARENA = range(4)
_MAX_PAGES: Final = MAX_MEMORY >> PAGE_SHIFT
_ARENA_NAMES: Final = MEMORIES[2:]
_USUAL: Final = range(USUAL_SEED, USUAL_SEED + 1)
_ANY: Final = range(SEEDS)
#: Pages that any encoded case may have, and bytes of it that each further one takes.
_FREE_PAGES: Final = 64
_BYTES_PER_PAGE: Final = 2
#: Runs of bytes; zeros between them are told as their number where that is shorter.
_RUN: Final = re.compile(rb"[^\0](?:\0{0,3}[^\0])*", re.DOTALL)
#: Where two pages are compared to see whether one may be the other with patches.
_SAMPLES: Final = range(0, PAGE_SIZE, 256)


class _Place(NamedTuple):
    """A page of the arena: its mode, one of MEMORIES, its seed, the entry, and its bytes."""

    mode: str
    name: str
    seed: int
    entry: int
    page: bytes


def budget(size: int) -> int:
    """Pages that a case encoded in so many bytes may have."""
    return _FREE_PAGES + size // _BYTES_PER_PAGE


def size_for(pages: int) -> int:
    """Bytes that the encoding of a case with so many pages needs at least."""
    return max(0, pages - _FREE_PAGES) * _BYTES_PER_PAGE


def page_count(entries: Sequence[Entry]) -> int:
    """Pages that the entries touch; one that several touch counts for each."""
    return sum(_pages_of(addr, len(data)) for addr, data in entries)


def _pages_of(addr: int, size: int) -> int:
    return ((addr + max(size, 1) - 1) >> PAGE_SHIFT) - (addr >> PAGE_SHIFT) + 1


# -- writing -------------------------------------------------------------------------------------


def write_memory(out: bytearray, mode: str, usual: str, entries: Sequence[Entry], width: int) -> None:
    """Append the entries, whose addresses have `width` bits; `usual` is the memory that is likely theirs."""
    name, seed, kept = _basis(mode, usual, entries)
    out.append(MEMORIES.index(name))
    out.append(seed)
    out += kept.to_bytes(2, "little")
    rest = entries[kept.bit_count() :]
    out += number(len(rest))
    for addr, data in rest:
        _write_entry(out, mode, addr, data, width)


def _basis(mode: str, usual: str, entries: Sequence[Entry]) -> tuple[str, int, int]:
    """The memory of which most entries begin the list, and which of them do."""
    found = [("none", USUAL_SEED, 0)]
    if entries:
        named = {(usual, USUAL_SEED), ("built", USUAL_SEED)}
        places = (_place_of(mode, data) for _, data in entries[:8])
        named |= {(place.name, place.seed) for place in places if place is not None and place.mode == mode}
        found += [(name, seed, _kept(memory_of(name, seed, mode), entries)) for name, seed in sorted(named)]
    return max(found, key=lambda one: one[2].bit_count())


def _kept(memory: Memory, entries: Sequence[Entry]) -> int:
    """Which entries of a memory, as bits, are the first ones of a list in the same order."""
    kept, place = 0, 0
    for i, entry in enumerate(memory.entries[:16]):
        if place < len(entries) and entries[place] == entry:
            kept |= 1 << i
            place += 1
    return kept


def _write_entry(out: bytearray, mode: str, addr: int, data: bytes, width: int) -> None:
    place = _place_of(mode, data) if len(data) == PAGE_SIZE else None
    if not data:
        out.append(_EMPTY)
        out += number(addr, width)
    elif place is not None:
        out.append(_ARENA if place.mode == mode else _OTHER_ARENA)
        out += number(addr, width)
        if place.mode != mode:
            out.append(MODES.index(place.mode))
        out += bytes((_ARENA_NAMES.index(place.name), place.seed, place.entry))
        _write_runs(out, _runs_of(data, place.page))
    else:
        out.append(_SPARSE)
        out += number(addr, width) + number(len(data))
        _write_runs(out, [(match.start(), match.group()) for match in _RUN.finditer(data)])


def _runs_of(new: bytes, old: bytes) -> list[Entry]:
    """Where two pages differ, and the new bytes."""
    if new == old:
        return []
    changed = int.from_bytes(new, "little") ^ int.from_bytes(old, "little")
    runs = _RUN.finditer(changed.to_bytes(len(new), "little"))
    return [(match.start(), new[match.start() : match.end()]) for match in runs]


def _write_runs(out: bytearray, runs: Sequence[Entry]) -> None:
    out += number(len(runs))
    done = 0
    for start, data in runs:
        out += number(start - done) + number(len(data)) + data
        done = start + len(data)


def _place_of(mode: str, data: bytes) -> _Place | None:
    """The page of the arena that a page is, but for some patches."""
    if len(data) != PAGE_SIZE or data.count(0) > PAGE_SIZE // 2:
        return None
    for modes, seeds in (((mode,), _USUAL), (MODES, _USUAL), ((mode,), _ANY)):
        known = _pages(modes, seeds)
        for at in _SAMPLES:
            place = known.get((at, data[at : at + 16]))
            if place is not None and _alike(data, place.page):
                return place
    return None


def _alike(one: bytes, other: bytes) -> bool:
    same = sum(one[at : at + 16] == other[at : at + 16] for at in _SAMPLES)
    return 2 * same > len(_SAMPLES)


@cache
def _pages(modes: tuple[str, ...], seeds: range) -> dict[tuple[int, bytes], _Place]:
    """Some bytes of each page of the arenas, with their offset."""
    return {
        (at, data[at : at + 16]): _Place(mode, name, seed, entry, data)
        for mode in modes
        for seed in seeds
        for name in _ARENA_NAMES
        for entry, (_, data) in enumerate(memory_of(name, seed, mode).entries)
        if len(data) == PAGE_SIZE
        for at in _SAMPLES
    }


# -- reading -------------------------------------------------------------------------------------


def read_memory(source: Source, mode: str, width: int) -> tuple[Entry, ...]:
    """The entries that the source tells of: none beyond the address space, and of not too many pages."""
    name = MEMORIES[source.byte() % len(MEMORIES)]
    memory = memory_of(name, source.byte() % SEEDS, mode)
    kept = source.fixed(2)
    entries = [entry for i, entry in enumerate(memory.entries) if kept >> i & 1 and not entry[0] >> width]
    left = budget(len(source.data)) - page_count(entries)
    for _ in range(source.below(MAX_ENTRIES + 1)):
        if source.ended or left <= 0:
            break
        entry = _read_entry(source, mode, width, left)
        left -= _pages_of(entry[0], len(entry[1]))
        entries.append(entry)
    return tuple(_limited(entries))


def _read_entry(source: Source, mode: str, width: int, pages: int) -> Entry:
    """One entry of at most so many pages, cut off where the address space ends."""
    kind = source.byte() % 4
    addr = source.number(width)
    if kind == _EMPTY:
        return addr, b""
    if kind in {_ARENA, _OTHER_ARENA}:
        if kind == _OTHER_ARENA:
            mode = MODES[source.byte() % len(MODES)]
        name, seed = _ARENA_NAMES[source.byte() % len(_ARENA_NAMES)], source.byte() % SEEDS
        pieces = memory_of(name, seed, mode).entries
        page = bytearray(pieces[source.byte() % len(pieces)][1])
    else:
        page = bytearray(min(source.below(MAX_MEMORY + 1), pages << PAGE_SHIFT))
    _read_runs(source, page)
    return addr, bytes(page[: (1 << width) - addr])


def _read_runs(source: Source, page: bytearray) -> None:
    """Lay runs over a page; what is behind its end is lost."""
    at = 0
    for _ in range(source.number()):
        if source.ended:
            return
        at += source.number()
        data = source.take(source.below(MAX_MEMORY + 1))
        page[at : at + len(data)] = data[: max(0, len(page) - at)]
        at += len(data)


def _limited(entries: list[Entry]) -> list[Entry]:
    """The first entries, as many as do not make more pages than a case may have."""
    if page_count(entries) <= _MAX_PAGES:
        return entries
    pages: set[int] = set()
    for i, (addr, data) in enumerate(entries):
        first = addr >> PAGE_SHIFT
        pages.update(range(first, first + _pages_of(addr, len(data))))
        if len(pages) > _MAX_PAGES:
            return entries[:i]
    return entries
