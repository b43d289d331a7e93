"""How a campaign grew: over its cases, and over the time that its runs took.

Over the cases growth is the same whatever the workers are. Times are those of one machine and one day, and
stand apart in every report.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Final, NamedTuple, TypeAlias

import msgspec

from emufuzz.fuzz.accounting import is_implemented
from emufuzz.fuzz.cells import Cell, CellCount
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.store.view import Merge

#: Points of a curve.
_POINTS: Final = 120

Count: TypeAlias = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]
Seconds: TypeAlias = Annotated[float, msgspec.Meta(ge=0, le=1e10)]
Cells: TypeAlias = Mapping[Cell, CellCount]
#: The place of a case: its batch, and where it is in that.
Place: TypeAlias = tuple[int, int]
#: Behind all places.
_END: Final = (1 << 64, 0)


class Point(NamedTuple):
    """How far a campaign was after so many cases: cells, (implemented leaf, mode) pairs, findings."""

    cases: Count
    cells: Count
    pairs: Count
    findings: Count


class Moment(NamedTuple):
    """How far a campaign was after so many seconds of all its runs, the batch in work not counted."""

    seconds: Seconds
    cases: Count
    cells: Count
    pairs: Count
    findings: Count


class _Climb:
    """Counts what was reached before a place, for places that only rise."""

    def __init__(self, cells: Cells, found: Sequence[Place]) -> None:
        self._firsts = sorted(((c.batch, c.index), cell) for cell, c in cells.items())
        self._found = sorted(found)
        self._pairs: set[tuple[str, str]] = set()
        self._cells = self._findings = 0

    def before(self, end: Place) -> tuple[int, int, int]:
        """Cells, pairs and findings whose first case is before a place."""
        while self._cells < len(self._firsts) and self._firsts[self._cells][0] < end:
            cell = self._firsts[self._cells][1]
            self._cells += 1
            if is_implemented(cell.leaf):
                self._pairs.add((cell.leaf, cell.mode))
        while self._findings < len(self._found) and self._found[self._findings] < end:
            self._findings += 1
        return self._cells, len(self._pairs), self._findings


def over_cases(cases: int, cells: Cells, found: Sequence[Place]) -> Iterator[Point]:
    """Growth over the cases.

    Args:
        cases: How many there are.
        cells: What is counted of each cell; one of which nobody noted the first case counts from the start.
        found: Where the first case of each finding is.
    """
    climb = _Climb(cells, found)
    step = max(-(-cases // _POINTS), 1)
    for end in range(step, cases, step):
        yield Point(end, *climb.before(divmod(end, BATCH_SIZE)))
    yield Point(cases, *climb.before(_END))


def over_time(
    cells: Cells, found: Sequence[Place], merges: Sequence[Merge], seconds: float
) -> Iterator[Moment]:
    """Growth over the time: how far the campaign was at the end of each of _POINTS equal parts of it.

    Args:
        cells: As of `over_cases`.
        found: As of `over_cases`.
        merges: When batches were merged, in their order; without them nothing is known.
        seconds: How long all runs took, which is the last moment.
    """
    climb = _Climb(cells, found)
    moment = None
    for merge, now in _last_of_parts(merges, seconds):
        moment = Moment(round(now, 3), merge.total, *climb.before((merge.batch, merge.first + merge.cases)))
        yield moment
    if moment is not None and moment.seconds < round(seconds, 3):
        yield moment._replace(seconds=round(seconds, 3))


def _last_of_parts(merges: Sequence[Merge], seconds: float) -> Iterator[tuple[Merge, float]]:
    """The last merge of each part of the time, with its time, which never goes back."""
    part = max([seconds, *(merge.seconds for merge in merges)]) / _POINTS or 1.0
    chosen: tuple[Merge, float] | None = None
    for merge in merges:
        now = max(merge.seconds, chosen[1] if chosen else 0.0)
        if chosen is not None and now // part != chosen[1] // part:
            yield chosen
        chosen = merge, now
    if chosen is not None:
        yield chosen
