"""Taking as many of several things away as possible, in halves first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def reduced(items: Sequence[T], works: Callable[[list[T]], bool]) -> list[T]:
    """Those of `items` that remain if as many as possible go, given that all of them work.

    Tries to take away all, then halves, quarters and so on down to single ones (delta debugging
    without complements): about twice the logarithm of their number for each that has to stay.
    """
    kept = list(items)
    size = len(kept)
    while size:
        start = 0
        while start < len(kept):
            rest = kept[:start] + kept[start + size :]
            if works(rest):
                kept = rest
            else:
                start += size
        size = min(size // 2, len(kept)) if size > 1 else 0
    return kept
