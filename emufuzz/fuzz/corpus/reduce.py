"""Cases without what they do not need for that which they are in a corpus for.

The passes are few and coarse, unlike those that shrink a finding (emufuzz.fuzz.shrink): a corpus has
thousands of cases, and what counts is that they are short. Fields that nothing depends on are left out,
as an absent field has its default (docs/case-format.md); the values of the others stay.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Final

from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, System, case_memory, is_physical
from emufuzz.fuzz.shrink.fields import Key, Parts, case_of, field_of, parts_of
from emufuzz.fuzz.shrink.memory import trim
from emufuzz.fuzz.shrink.reduce import reduced
from emufuzz.subject.flat import FlatSubject

#: Whether a case still does what it is kept for.
Works = Callable[[Case], bool]

#: Fields that are always written, so that nothing is gained without them.
_ALWAYS: Final = frozenset(((("rip",)), ("rflags",)))
_MEMORY: Final = ("mem", "phys")
#: Characters of a line that is not worth being cut down.
SHORT: Final = 450
#: Bytes of a page that are not 0, and less than a line's worth of zeros between them.
_RUN: Final = re.compile(rb"[^\0](?:\0{0,15}[^\0])*")
_NONE: Final = object()


def reduce_case(case: Case, works: Works) -> Case:
    """The case with as little as possible, given that it works; `works` is asked about valid cases only.

    Cases of a line that is short anyway stay as they are.
    """
    if len(case_to_json(case)) <= SHORT:
        return case

    def valid_and_works(other: Case) -> bool:
        try:
            return case_from_json(case_to_json(other)) is not None and works(other)
        except CaseError:
            return False

    spread = spread_out(_touched(case, valid_and_works))
    if not valid_and_works(spread):
        return case
    return _fewer_fields(spread, valid_and_works)


def _touched(case: Case, works: Works) -> Case:
    """Only those bytes of flat memory that the emulator touches."""
    if is_physical(case) or case.path is not None or "callbacks" in (case.extra or {}):
        return case
    trimmed = trim(case, FlatSubject(events=True))
    return trimmed if works(trimmed) else case


def spread_out(case: Case) -> Case:
    """The same memory as entries that can be left out one by one: bytes that are not 0, and pages."""
    entries: list[tuple[int, bytes]] = []
    for pfn, page in sorted(case_memory(case).pages.items()):
        start = pfn << PAGE_SHIFT
        runs = [(start + match.start(), match.group()) for match in _RUN.finditer(page)]
        marker = start if not runs or runs[0][0] != start else start | PAGE_MASK
        if all(at != marker for at, _ in runs):
            entries.append((marker, b""))
        entries += runs
    parts = {key: value for key, value in parts_of(case).items() if key[0] not in _MEMORY}
    kind = "phys" if is_physical(case) else "mem"
    return case_of(case, parts | {(kind, at): data for at, data in entries})


def _fewer_fields(case: Case, works: Works) -> Case:
    """Fields at the values that absent ones have."""
    parts, blank = parts_of(case), parts_of(_blank(case))
    differing = [key for key, value in parts.items() if blank.get(key, _NONE) != value]
    fields = [field for field in dict.fromkeys(map(field_of, differing)) if field not in _ALWAYS]

    def only(kept: Iterable[Key]) -> Case:
        return case_of(case, _with_blanks(parts, blank, frozenset(fields).difference(kept)))

    return only(reduced(fields, lambda kept: len(kept) < len(fields) and works(only(kept))))


def _blank(case: Case) -> Case:
    return Case(case.id, case.mode, case.code, (0,) * 16, case.rip, case.rflags, System())


def _with_blanks(parts: Parts, blank: Parts, gone: frozenset[Key]) -> Parts:
    """The parts with those of some fields blank, or missing where blanks are."""
    kept = {}
    for key, value in parts.items():
        if field_of(key) not in gone:
            kept[key] = value
        elif key in blank:
            kept[key] = blank[key]
    return kept
