"""Distillation: a small set of short cases that covers all that many cases cover.

First each case in turn is kept if it covers something that none before it did, so that memory is bounded
by what there is to cover, not by the number of cases. Of those kept a greedy cover is chosen, and each
case of it is cut down to what its share of the cover needs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from emufuzz.case.json import case_to_json
from emufuzz.case.model import Case
from emufuzz.fuzz.corpus.cover import greedy_cover
from emufuzz.fuzz.corpus.observe import Observer
from emufuzz.fuzz.corpus.reduce import reduce_case

#: Cases between two reports of progress.
_PERIOD: Final = 256


@dataclass(slots=True)
class Progress:
    """What distillation is at.

    Attributes:
        step: `read`, `kept` when all are read, `reduce`, `done`.
        cases: Cases done in this step.
        kept: Those that were kept, or of `reduce` all that there are.
        elements: Cells and arcs that are covered.
        refused: Cases that their subject cannot take, or that crash it.
    """

    step: str = "read"
    cases: int = 0
    kept: int = 0
    elements: int = 0
    refused: int = 0


def ignore(_: Progress) -> None:
    """Nobody wants to know."""


def distill(
    cases: Iterable[Case],
    observer: Observer,
    report: Callable[[Progress], None] = ignore,
    *,
    reduce: bool = True,
) -> list[Case]:
    """Cases that cover what all of them cover, in the order in which they were given.

    Args:
        cases: Looked at once.
        observer: Says what a case covers.
        report: Is told how far it has come.
        reduce: Cut the chosen cases down.
    """
    progress = Progress()
    kept, elements = _worth_keeping(cases, observer, progress, report)
    progress.step = "kept"
    report(progress)
    costs = [len(case_to_json(case)) for case in kept]
    chosen = sorted(greedy_cover(elements, costs))
    progress.step, progress.cases, progress.kept = "reduce", 0, len(chosen)
    result = []
    for index, new in chosen:
        result.append(_reduced(kept[index], new, observer) if reduce else kept[index])
        progress.cases += 1
        if progress.cases % _PERIOD == 0:
            report(progress)
    progress.step = "done"
    report(progress)
    return result


def _worth_keeping(
    cases: Iterable[Case], observer: Observer, progress: Progress, report: Callable[[Progress], None]
) -> tuple[list[Case], list[frozenset[int]]]:
    """Cases that cover something new when their turn comes, and what each of them covers."""
    seen: set[int] = set()
    kept, elements = [], []
    for case in cases:
        progress.cases += 1
        if progress.cases % _PERIOD == 0:
            report(progress)
        observed = observer.observe(case)
        if observed is None:
            progress.refused += 1
        elif not observed.elements <= seen:
            seen |= observed.elements
            kept.append(case)
            elements.append(observed.elements)
            progress.kept, progress.elements = len(kept), len(seen)
    return kept, elements


def _reduced(case: Case, needed: frozenset[int], observer: Observer) -> Case:
    return reduce_case(case, lambda other: observer.covers(other, needed))
