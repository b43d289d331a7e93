"""Feedback of a batch: the cases that reached what the corpus does not know, with all that they reached.

Cells and verdicts are by-products of the campaign's loop. Arcs cost a slow run each, so that only a sample
of places and cases with a new cell or verdict are looked at, a bounded number per batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from emufuzz.case.model import Case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.guided.arcs import arcs_of
from emufuzz.fuzz.guided.candidate import Candidate
from emufuzz.fuzz.guided.features import cell_feature, verdict_feature
from emufuzz.fuzz.guided.packed import pack
from emufuzz.subject.base import Subject

#: One place in so many is looked at whatever its cell.
SAMPLE: Final = 256
#: Cases with a new cell or verdict that are looked at per batch.
MOST_TRACED: Final = 8
#: Cases per batch that can come into the corpus.
MOST_CANDIDATES: Final = 24


def candidates(
    subject: Subject,
    cases: Sequence[Case],
    result: BatchResult,
    known: frozenset[int],
    excluded: frozenset[int] = frozenset(),
) -> list[Candidate]:
    """The candidates of a whole batch, the most promising first.

    Args:
        subject: Runs the cases whose arcs are looked at.
        cases: The cases of the batch, from its first place on.
        result: What became of them.
        known: Features that do not count.
        excluded: Places that must not be run.
    """
    reached = _Reached(result, known)
    places = reached.places(len(cases), result.number) - excluded
    for index in sorted(places):
        reached.arcs[index] = arcs_of(subject, cases[index]) - known
    found = [index for index in reached.interesting() if index not in excluded]
    found.sort(key=reached.rank)
    return [reached.candidate(index, cases[index]) for index in found[:MOST_CANDIDATES]]


class _Reached:
    """What the cases of a batch reached that is not known, by their places."""

    def __init__(self, result: BatchResult, known: frozenset[int]) -> None:
        self.cells = {
            tally.index: key for key, tally in result.cells.items() if cell_feature(key) not in known
        }
        self.verdicts: dict[int, list[int]] = {}
        for (kind, key), index in result.firsts.items():
            feature = verdict_feature(kind, key)
            if feature not in known:
                self.verdicts.setdefault(index, []).append(feature)
        self.arcs: dict[int, frozenset[int]] = {}

    def places(self, size: int, number: int) -> set[int]:
        """Places whose arcs are looked at: a sample, cases with new verdicts, and some with new cells."""
        sample = range(number * 37 % SAMPLE, size, SAMPLE)
        new = sorted(self.verdicts)[:MOST_TRACED]
        cells = sorted(self.cells, key=lambda index: cell_feature(self.cells[index]))
        return {*sample, *new, *cells[: MOST_TRACED - len(new)]}

    def interesting(self) -> list[int]:
        """Places of cases that have something new."""
        return sorted({*self.cells, *self.verdicts, *(index for index, arcs in self.arcs.items() if arcs)})

    def rank(self, index: int) -> tuple[int, int, int]:
        """New arcs come first, then new verdicts, then new cells; of several the earliest place."""
        return -len(self.arcs.get(index, ())), -len(self.verdicts.get(index, ())), index

    def candidate(self, index: int, case: Case) -> Candidate:
        """The candidate at a place."""
        cell, verdicts = self.cells.get(index), self.verdicts.get(index, [])
        arcs = self.arcs.get(index, frozenset())
        cells = [] if cell is None else [cell_feature(cell)]
        features = tuple(sorted({*cells, *verdicts, *arcs}))
        return Candidate(index, features, len(arcs), bool(verdicts), cell, pack(case))
