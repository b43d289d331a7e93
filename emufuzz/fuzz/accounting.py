"""What becomes of cases: of a batch, and of a whole campaign."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import msgspec

from emufuzz.arch.leaves import LEAVES, leaf_rows
from emufuzz.fuzz.cells import CRASH, HANG, Tallies, Tally, cpl_of
from emufuzz.fuzz.finding import Bucket, Finding
from emufuzz.fuzz.forms import forms
from emufuzz.fuzz.guided.candidate import Candidate
from emufuzz.fuzz.judging import Judged

#: Kinds of verdicts.
SKIPPED: Final = "skipped"
IN_FINDING: Final = "finding"
RESULT: Final = "result"

_NOWHERE: Final = 1 << 62


class BatchResult(msgspec.Struct):
    """What became of a batch, or of a part of one. Every case is agreed, skipped, or a finding.

    `cells` counts every case once, `results` those of exit paths by (path, result), of which a case may
    have several; `verdicts` counts what oracles say of cases, `fields` for how many fields of a sample they
    vouch (emufuzz.fuzz.judging); `findings` holds the first of each bucket and `bucket_cases` how many
    cases fell into it. `firsts` is the place of the first case of each (kind of verdict, verdict), and
    `candidates` are what the corpus of a guided campaign may take.
    """

    number: int
    cases: int = 0
    agreed: int = 0
    skipped: dict[str, int] = {}
    cells: Tallies = {}
    results: dict[tuple[str, str], int] = {}
    verdicts: Judged = {}
    fields: Judged = {}
    findings: list[Finding] = []
    bucket_cases: dict[Bucket, int] = {}
    firsts: dict[tuple[str, str], int] = {}
    candidates: list[Candidate] = []

    def skip(self, reason: str, index: int) -> None:
        """Count a case that is skipped."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        self.note(SKIPPED, reason, index)

    def note(self, kind: str, verdict: str, index: int) -> None:
        """Note that the case at a place has a verdict."""
        key = kind, verdict
        if index < self.firsts.get(key, _NOWHERE):
            self.firsts[key] = index

    def add(self, finding: Finding) -> None:
        """Count a finding; the first of its bucket is kept."""
        bucket = finding.bucket
        self.bucket_cases[bucket] = self.bucket_cases.get(bucket, 0) + 1
        for i, other in enumerate(self.findings):
            if other.bucket == bucket:
                self.findings[i] = min(other, finding, key=lambda one: one.index)
                return
        if self.bucket_cases[bucket] == 1:
            self.findings.append(finding)

    def add_incident(self, finding: Finding) -> None:
        """Count a case that ended its worker: nobody knows more of it than the finding."""
        self.cases += 1
        self.add_failed_cell(finding)
        self.add(finding)

    def add_failed_cell(self, finding: Finding) -> None:
        """Count the cell of a case that has no outcome."""
        case = finding.case
        how = HANG if finding.kind == "hang" else CRASH
        tally = self.cells.setdefault(
            (finding.leaf, case.mode, cpl_of(case), how, case.path or ""),
            Tally(index=finding.index, code=case.code),
        )
        tally.cases += 1
        tally.findings += 1
        if finding.index < tally.index:
            tally.index, tally.code = finding.index, case.code


@dataclass(slots=True)
class Totals:
    """The accounting: `cases` = `agreed` + all of `skipped` + all of `bucket_cases` = `in_cells`.

    Cells themselves are in the store: there are tens of thousands, and more in every hour, while a driver's
    memory must not grow.
    """

    cases: int = 0
    agreed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bucket_cases: dict[Bucket, int] = field(default_factory=dict)
    in_cells: int = 0
    results: dict[tuple[str, str], int] = field(default_factory=dict)
    verdicts: Judged = field(default_factory=dict)
    fields: Judged = field(default_factory=dict)
    _covered: set[tuple[str, str]] = field(default_factory=set)

    @property
    def compared(self) -> int:
        """Cases on which subject and oracles were compared to the end."""
        return self.agreed + sum(self.bucket_cases.values())

    @property
    def skipped_cases(self) -> int:
        """Cases that were skipped, whatever the reason."""
        return sum(self.skipped.values())

    @property
    def balanced(self) -> bool:
        """Whether every case is accounted for once."""
        return self.cases == self.compared + self.skipped_cases == self.in_cells

    def covered(self) -> int:
        """(implemented leaf, mode) pairs that occurred."""
        return len(self._covered)

    def add_cell(self, leaf: str, mode: str, cases: int) -> None:
        """Count the cases of a cell, or of all cells of a leaf and a mode."""
        self.in_cells += cases
        pair = leaf, mode
        if pair not in self._covered and is_implemented(leaf):
            self._covered.add(pair)

    def merge(self, result: BatchResult) -> list[Finding]:
        """Add a batch; gives the findings of new buckets, in the order of their cases."""
        fresh = [f for f in result.findings if f.bucket not in self.bucket_cases]
        self.cases += result.cases
        self.agreed += result.agreed
        add_counts(self.skipped, result.skipped)
        add_counts(self.bucket_cases, result.bucket_cases)
        for (leaf, mode, *_), tally in result.cells.items():
            self.add_cell(leaf, mode, tally.cases)
        add_counts(self.results, result.results)
        add_counts(self.verdicts, result.verdicts)
        add_counts(self.fields, result.fields)
        return sorted(fresh, key=lambda finding: finding.index)

    def summary(self) -> dict[str, Any]:
        """The accounting as JSON values."""
        return {
            "cases": self.cases,
            "compared": self.compared,
            "agreed": self.agreed,
            "skipped": dict(sorted(self.skipped.items())),
            "findings": [{**b._asdict(), "cases": n} for b, n in sorted(self.bucket_cases.items())],
            "covered": self.covered(),
            **({"results": self._results_by_path()} if self.results else {}),
        }

    def _results_by_path(self) -> dict[str, dict[str, int]]:
        """Path -> result -> cases that had it."""
        paths: dict[str, dict[str, int]] = {}
        for (path, name), count in sorted(self.results.items()):
            paths.setdefault(path, {})[name] = count
        return paths


def is_implemented(leaf: str) -> bool:
    """Whether KVM can execute it."""
    return leaf in LEAVES and LEAVES[leaf].implemented


def add_counts(total: dict[Any, int], part: dict[Any, int]) -> None:
    """Add the counts of a part."""
    for key, count in part.items():
        total[key] = total.get(key, 0) + count


def coverable(modes: tuple[str, ...]) -> int:
    """How many (implemented leaf, mode) pairs the generator can reach in these modes."""
    implemented = {row.leaf for row in leaf_rows() if row.implemented}
    pairs = set()
    for form in forms():
        if form.leaf in implemented:
            pairs |= {(form.leaf, mode) for mode in modes if form.mode64 in (None, mode == "prot64")}
    return len(pairs)
