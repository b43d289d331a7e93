"""The emulator against recorded outcomes as an oracle's: undefined flags and known quirks are no findings."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from emufuzz.arch.leaves import FAMILIES, family_of
from emufuzz.oracle.compare import AGREE, FINDING, judge, refusal
from emufuzz.oracle.vectors import VectorsOracle
from emufuzz.subject.vectors import NO_LEAF, run_vectors


@dataclass(slots=True)
class JudgedCount:
    """How a family fares; `explained` counts quirks, `refused` refusals by reason, `ids` names findings."""

    total: int = 0
    agreed: int = 0
    explained: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)

    @property
    def numbers(self) -> tuple[int, int, int, int, int]:
        """Total, agreed, explained, refused, findings."""
        return self.total, self.agreed, self.explained.total(), self.refused.total(), len(self.ids)


def judge_vectors(path: Path, families: frozenset[str]) -> dict[str, JudgedCount]:
    """Judge the vectors of a file that belong to `families`; the counts of those that occur.

    Raises:
        CaseError: the file is not one of vectors, or cannot be read.
    """
    oracle = VectorsOracle(())
    counts: dict[str, JudgedCount] = {}
    for case, outcome, expected in run_vectors(path):
        family = family_of(outcome.leaf) if outcome.leaf else NO_LEAF
        if family not in families:
            continue
        count = counts.setdefault(family, JudgedCount())
        count.total += 1
        verdict = judge(case, outcome, expected, oracle)
        if verdict.kind == AGREE:
            count.agreed += 1
        elif verdict.kind == FINDING:
            count.ids.append(case.id)
        elif refusal(outcome):
            count.refused[outcome.reason or outcome.rc] += 1
        else:
            count.explained[verdict.reason] += 1
    return {name: counts[name] for name in FAMILIES if name in counts}
