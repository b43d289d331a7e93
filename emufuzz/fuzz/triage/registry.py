"""Filters by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from emufuzz.fuzz.triage.base import Filter
from emufuzz.fuzz.triage.duplicate import duplicate
from emufuzz.fuzz.triage.gap import known_gap
from emufuzz.fuzz.triage.gone import gone
from emufuzz.fuzz.triage.marked import marked
from emufuzz.fuzz.triage.quirk import known_quirk
from emufuzz.fuzz.triage.vendor import vendor

# fmt: off
#: In the order in which they are asked by default; the first that says something decides.
FILTERS: Final[Mapping[str, Filter]] = MappingProxyType({
    "known-quirk": known_quirk,
    "known-gap":   known_gap,
    "gone":        gone,
    "vendor":      vendor,
    "marked":      marked,
    "duplicate":   duplicate,
})
# fmt: on


class UnknownFilterError(ValueError):
    """There is no filter of that name; the message lists those that there are."""


def chosen_filters(text: str) -> tuple[str, ...]:
    """The filters of a comma-separated list, each once, in its order.

    Raises:
        UnknownFilterError: There is no such filter, or the list is empty.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    known = ", ".join(FILTERS)
    if not names:
        raise UnknownFilterError(f"names no filter, known are {known}")
    for name in names:
        if name not in FILTERS:
            raise UnknownFilterError(f"unknown filter {name!r}, known are {known}")
    return names
