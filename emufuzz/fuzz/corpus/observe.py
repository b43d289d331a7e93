"""What a case covers: its cell, and the arcs of emulator/ and kvm/, as numbers that are cheap to compare."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Final, NamedTuple, TypeAlias

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.cells import Cell, CellKey, cell_of
from emufuzz.fuzz.corpus.arcs import ArcTracer
from emufuzz.fuzz.corpus.legal import NOT_RUN
from emufuzz.subject.base import Subject
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

#: What cells can be told apart by.
ASPECTS: Final = Cell._fields
#: An arc, or the chosen aspects of a cell.
Item: TypeAlias = tuple[Any, ...]


class Observed(NamedTuple):
    """What one case covers: its outcome, its cell, and numbers that stand for its cell and its arcs."""

    outcome: Outcome
    cell: CellKey
    elements: frozenset[int]


class Observer:
    """Runs cases through the subject that takes them, traced, and numbers what they cover.

    The same thing has the same number in all observations of one observer.
    """

    def __init__(self, aspects: Iterable[str] = ASPECTS, *, arcs: bool = True) -> None:
        """Tell cells apart by these aspects; without `arcs` cells alone count, and cases run far faster."""
        self._flat = FlatSubject(events=False)
        self._kvm = KvmSubject()
        self._tracer = ArcTracer()
        self._arcs = arcs
        self._aspects = tuple(ASPECTS.index(name) for name in ASPECTS if name in set(aspects))
        self._with_outcome = "outcome" in set(aspects)
        self._numbers: dict[Item, int] = {}
        self._items: list[Item] = []

    def subject_of(self, case: Case) -> Subject:
        """Who takes the case: KVM if it names an exit path, else the emulator alone."""
        return self._kvm if case.path is not None else self._flat

    def observe(self, case: Case) -> Observed | None:
        """What a case covers; None if its subject cannot take it, or fails.

        A crash of the subject is a finding, no example.
        """
        found = self._run(case, None if self._arcs else frozenset())
        if found is None:
            return None
        outcome, cell, items = found
        return Observed(outcome, cell, frozenset([self._number(item) for item in items]))

    def covers(self, case: Case, wanted: frozenset[int]) -> bool:
        """Whether a case covers all of these numbers; only the files that have them are traced."""
        items = [self._items[number] for number in wanted]
        found = self._run(case, frozenset(item[0] for item in items if _is_arc(item)))
        return found is not None and found[2].issuperset(items)

    def _run(self, case: Case, files: frozenset[str] | None) -> tuple[Outcome, CellKey, set[Item]] | None:
        """Outcome, cell, and all that is covered in these files, None = all."""
        subject = self.subject_of(case)
        try:
            subject.check(case)
        except UnsupportedCaseError:
            return None
        items: set[Item] = set()
        if files is not None and not files:
            (outcome,) = subject.run((case,))
        else:
            (outcome,), arcs = self._tracer.run(lambda: subject.run((case,)), files)
            items.update(arcs)
        if outcome.crash or outcome.hang:
            return None
        cell = cell_of(case, outcome)
        if self._with_outcome or cell[3] not in NOT_RUN:
            items.add(tuple([cell[aspect] for aspect in self._aspects] + [None]))
        return outcome, cell, items

    def _number(self, item: Item) -> int:
        number = self._numbers.get(item)
        if number is None:
            number = self._numbers[item] = len(self._items)
            self._items.append(item)
        return number


def _is_arc(item: Item) -> bool:
    """Cells end in None, so that they are never equal to an arc."""
    return item[-1] is not None
