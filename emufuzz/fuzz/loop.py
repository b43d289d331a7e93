"""The campaign's inner loop: a batch of cases through subject, oracle and comparison, in one process."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.trim import trim
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import (
    AGREE,
    SKIPPED,
    Difference,
    agree,
    compare,
    judge,
    primary_kind,
    refusal,
)
from emufuzz.subject.base import Subject
from emufuzz.subject.flat import FlatSubject

#: Cases between two progress marks.
CHUNK: Final = 128

PHASE_GENERATE: Final = 0
PHASE_SUBJECT: Final = 1
PHASE_ORACLE: Final = 2
PHASES: Final = ("generator", "subject", "oracle")


class Finding(msgspec.Struct):
    """A disagreement, crash or hang: the first case of its bucket, and what each side made of it.

    `subject` and `oracle` are None where they did not finish. `verdict` says in a sentence who
    disagrees; `index` is the case's place in its batch.
    """

    leaf: str
    mode: str
    kind: str
    batch: int
    index: int
    case: Case
    differences: tuple[Difference, ...]
    subject: Outcome | None = None
    oracle: Outcome | None = None
    verdict: str = ""

    @property
    def bucket(self) -> tuple[str, str, str]:
        """What findings are deduplicated by."""
        return self.leaf, self.mode, self.kind


class BatchResult(msgspec.Struct):
    """What became of a batch. Every case is agreed, skipped under a reason, or a finding.

    `coverage` counts cases by (leaf, mode); `findings` holds the first of each bucket and
    `bucket_cases` how many cases fell into it.
    """

    number: int
    cases: int = 0
    agreed: int = 0
    skipped: dict[str, int] = {}
    coverage: dict[tuple[str, str], int] = {}
    findings: list[Finding] = []
    bucket_cases: dict[tuple[str, str, str], int] = {}

    def add(self, finding: Finding) -> None:
        """Count a finding; the first of its bucket is kept."""
        bucket = finding.bucket
        if bucket not in self.bucket_cases:
            self.findings.append(finding)
        self.bucket_cases[bucket] = self.bucket_cases.get(bucket, 0) + 1


#: Called with (phase, index of the first case in work).
Progress = Callable[[int, int], None]


def _no_progress(phase: int, index: int) -> None:
    """For runs that nobody watches."""


class CampaignLoop:
    """Subject and oracle, and the loop that compares them."""

    def __init__(self, subject: Subject, oracle: Oracle, progress: Progress = _no_progress) -> None:
        self.subject = subject
        self.oracle = oracle
        self._progress = progress
        self._watcher = FlatSubject()

    def run_batch(self, number: int, cases: Sequence[Case], first: int = 0) -> BatchResult:
        """Run cases of batch `number`, from place `first` on; reports progress every CHUNK cases."""
        result = BatchResult(number, len(cases))
        subject_run, oracle_run, progress = self.subject.run, self.oracle.run, self._progress
        for offset in range(0, len(cases), CHUNK):
            part = cases[offset : offset + CHUNK]
            start = first + offset
            progress(PHASE_SUBJECT, start)
            outcomes = subject_run(part)
            live = [
                i
                for i, outcome in enumerate(outcomes)
                if outcome.rc in ("continue", "propagate_fault") and not outcome.crash
            ]
            progress(PHASE_ORACLE, start)
            if len(live) == len(part):
                answers = oracle_run(part)
            else:
                self._add_refused(result, start, part, outcomes)
                answers = oracle_run([part[i] for i in live])
            self._compare(result, start, part, outcomes, live, answers)
        return result

    def run_carefully(self, number: int, cases: Sequence[Case], excluded: frozenset[int]) -> BatchResult:
        """Run the cases one by one, without those at `excluded` places; exceptions become findings."""
        result = BatchResult(number, len(cases) - len(excluded))
        for index, case in enumerate(cases):
            if index in excluded:
                continue
            try:
                one = self.run_batch(number, (case,), index)
            except Exception:  # noqa: BLE001 - whatever a part of the loop raises is a finding about it
                lines = traceback.format_exc(limit=-6).strip()
                self._add_crash(result, index, case, lines)
                continue
            self._merge_one(result, one)
        return result

    def _add_crash(self, result: BatchResult, index: int, case: Case, lines: str) -> None:
        """Something other than the subject's own code raised: the oracle or the comparison."""
        difference = Difference(self.oracle.name, "crash", "", lines)
        result.add(
            Finding(
                "",
                case.mode,
                "crash",
                result.number,
                index,
                case,
                (difference,),
                verdict="the oracle crashed",
            )
        )

    @staticmethod
    def _merge_one(result: BatchResult, one: BatchResult) -> None:
        result.agreed += one.agreed
        for reason, count in one.skipped.items():
            result.skipped[reason] = result.skipped.get(reason, 0) + count
        for key, count in one.coverage.items():
            result.coverage[key] = result.coverage.get(key, 0) + count
        for finding in one.findings:
            result.add(finding)

    def _add_refused(
        self, result: BatchResult, start: int, part: Sequence[Case], outcomes: Sequence[Outcome]
    ) -> None:
        """Account for what the subject refused or crashed on; the oracle is not asked."""
        skipped = result.skipped
        for i, outcome in enumerate(outcomes):
            if outcome.crash or outcome.hang:
                verdict = judge(part[i], outcome, outcome, self.oracle)
                self._report(result, start + i, part[i], outcome, None, verdict.differences)
            elif reason := refusal(outcome):
                skipped[reason] = skipped.get(reason, 0) + 1

    def _compare(
        self,
        result: BatchResult,
        start: int,
        part: Sequence[Case],
        outcomes: Sequence[Outcome],
        live: Sequence[int],
        answers: Sequence[Outcome],
    ) -> None:
        agreed = 0
        skipped, oracle = result.skipped, self.oracle
        for i, answer in zip(live, answers, strict=True):
            outcome = outcomes[i]
            if agree(outcome, answer):
                agreed += 1
                continue
            verdict = judge(part[i], outcome, answer, oracle)
            if verdict.kind == AGREE:
                agreed += 1
            elif verdict.kind == SKIPPED:
                skipped[verdict.reason] = skipped.get(verdict.reason, 0) + 1
            else:
                self._report(result, start + i, part[i], outcome, answer, verdict.differences)
        result.agreed += agreed
        modes = [case.mode for case in part]
        seen = Counter(zip((outcome.leaf for outcome in outcomes), modes, strict=True))
        coverage = result.coverage
        for key, count in seen.items():
            coverage[key] = coverage.get(key, 0) + count

    def _report(
        self,
        result: BatchResult,
        index: int,
        case: Case,
        outcome: Outcome,
        answer: Outcome | None,
        differences: tuple[Difference, ...],
    ) -> None:
        """Count a finding; the first of its bucket is described."""
        kind = primary_kind(differences)
        bucket = outcome.leaf, case.mode, kind
        if bucket in result.bucket_cases:
            result.bucket_cases[bucket] += 1
            return
        if answer is None:
            verdict = f"{self.subject.name} failed: {kind}"
        else:
            verdict = f"{self.subject.name} and {self.oracle.name} disagree: {kind}"
            case, outcome, answer, differences = self._trimmed(case, outcome, answer, differences)
        result.add(Finding(*bucket, result.number, index, case, differences, outcome, answer, verdict))

    def _trimmed(
        self, case: Case, outcome: Outcome, answer: Outcome, differences: tuple[Difference, ...]
    ) -> tuple[Case, Outcome, Outcome, tuple[Difference, ...]]:
        """The finding with no more memory than it needs, if the same differs with that."""
        small = trim(case, self._watcher)
        (after,) = self.subject.run((small,))
        (answered,) = self.oracle.run((small,))
        if compare(small, after, answered) == differences:
            return small, after, answered, differences
        return case, outcome, answer, differences
