"""The port against recorded vectors, counted by family of instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from emufuzz.arch.leaves import FAMILIES, family_of
from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.errors import CaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.case.recorded import recorded_differences
from emufuzz.case.vectors import read_vectors
from emufuzz.subject.flat import FlatSubject

_BATCH: Final = 256

#: Where cases are counted whose bytes select no leaf: decoding failed before the tables were asked.
NO_LEAF: Final = "undefined"


@dataclass(slots=True)
class FamilyCount:
    """How a family fares; `refused` counts unexpected refusals by reason, `ids` names the others."""

    total: int = 0
    equal: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)

    @property
    def different(self) -> int:
        """Vectors that are not reproduced."""
        return self.total - self.equal


def check_vectors(path: Path, families: frozenset[str]) -> dict[str, FamilyCount]:
    """Run the vectors of a file that belong to `families`; the counts of those that occur.

    Raises:
        CaseError: a line of the file is not a vector, or the file cannot be read.
    """
    counts: dict[str, FamilyCount] = {}
    for case, outcome, expected in run_vectors(path):
        family = family_of(outcome.leaf) if outcome.leaf else NO_LEAF
        if family in families:
            _count(counts.setdefault(family, FamilyCount()), case, outcome, expected)
    return {name: counts[name] for name in FAMILIES if name in counts}


def run_vectors(path: Path) -> Iterator[tuple[Case, Outcome, Outcome]]:
    """Each vector's case, what the port makes of it, and what was recorded."""
    subject = FlatSubject(events=True)
    for batch in _batches(read_vectors(path)):
        outcomes = subject.run([case for case, _ in batch])
        for (case, expect), outcome in zip(batch, outcomes, strict=True):
            yield case, outcome, read_expect(path, case, expect)


def read_expect(path: Path, case: Case, expect: Any) -> Outcome:
    """The outcome that was recorded for a case of a file.

    Raises:
        CaseError: `expect` is not valid; the message names the file and the case.
    """
    try:
        return expect_to_outcome(case, expect)
    except CaseError as error:
        raise CaseError(f"{path}: {case.id}: expect.{error}") from None


def _batches(vectors: Iterable[tuple[Case, dict[str, Any]]]) -> Iterator[list[tuple[Case, dict[str, Any]]]]:
    iterator = iter(vectors)
    while batch := list(islice(iterator, _BATCH)):
        yield batch


def _count(count: FamilyCount, case: Case, outcome: Outcome, expected: Outcome) -> None:
    count.total += 1
    if not recorded_differences(case, outcome, expected):
        count.equal += 1
    elif outcome.rc == "unhandleable" and outcome.reason:
        count.refused[outcome.reason] += 1
    else:
        count.ids.append(case.id)
