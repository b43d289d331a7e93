"""Strategies for numbers: values at which carries, signs and limits change, and addresses."""

from __future__ import annotations

from functools import cache
from typing import Final

from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from emufuzz.case.build import CODE_PAGES, DATA_BASE, DATA_PAGES, STACK_BASE

_SMALL: Final = (0, 1, 2, 7, 8, 0x10)
_WIDTHS: Final = (8, 16, 32, 47, 48, 64)
#: Where pages of the default layout begin and end, the absent page behind the data among them.
_EDGES: Final = (*DATA_PAGES, DATA_PAGES[-1] + 0x1000, STACK_BASE, CODE_PAGES[0])


@cache
def words(bits: int) -> SearchStrategy[int]:
    """Integers of `bits` bits (1 .. 128): every other one at a boundary. Shrinks towards 0."""
    top = (1 << bits) - 1
    ends = {1 << width for width in _WIDTHS} | {1 << width - 1 for width in _WIDTHS}
    edges = {(end + by) & top for end in ends for by in (-1, 0, 1)} | {-value & top for value in _SMALL}
    chosen = sorted(edges | {value & top for value in _SMALL})
    return st.one_of(st.sampled_from(chosen), st.integers(0, top))


@cache
def addresses(bits: int = 64) -> SearchStrategy[int]:
    """Linear addresses: mostly in the data pages, at their ends, else anywhere. Shrinks to their first."""
    near = st.builds(int.__add__, st.sampled_from(_EDGES), st.integers(-16, 16))
    inside = st.integers(DATA_BASE, DATA_PAGES[-1] + 0xFFF)
    return st.one_of(inside, near.map(lambda value: value & (1 << bits) - 1), words(bits))
