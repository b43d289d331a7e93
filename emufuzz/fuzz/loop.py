"""The campaign's inner loop: a batch of cases through subject, oracle and comparison, in one process."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Sequence
from typing import Final

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.accounting import IN_FINDING, RESULT, BatchResult, add_counts
from emufuzz.fuzz.cells import add_cells, add_tallies, cell_of
from emufuzz.fuzz.finding import ALONE, FAILED, SPLIT, Bucket, Finding, place_of
from emufuzz.fuzz.judging import AGREED, OBJECTS, SAMPLE, count_fields, count_view
from emufuzz.fuzz.kvm.results import NO_EXIT, result_of
from emufuzz.fuzz.panel import Answers, Panel, objecting
from emufuzz.fuzz.steps import first_disagreement, has_steps
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import (
    AGREE,
    LEFT,
    SKIPPED,
    Difference,
    Verdict,
    agree,
    judge,
    left_before,
    primary_kind,
    refusal,
)
from emufuzz.subject.base import Subject

#: Cases between two progress marks.
CHUNK: Final = 128

PHASE_GENERATE: Final = 0
PHASE_SUBJECT: Final = 1
PHASE_ORACLE: Final = 2
PHASES: Final = ("generator", "subject", "oracle")

#: Results that leave something to compare.
_DONE: Final = ("continue", "propagate_fault")

#: Addresses in a reason would make each case a reason of its own.
_NUMBER: Final = re.compile(r"0x[0-9a-f]+")


def skip_reason(outcome: Outcome) -> str:
    """Why there is nothing to compare, without the numbers of this very case; empty if there is.

    A case whose exit did not come about is no refusal; for others the results stand in for a reason
    that the emulator does not give.
    """
    results = result_of(outcome) if outcome.extra is not None else frozenset[str]()
    if NO_EXIT in results:
        return _NUMBER.sub("..", outcome.reason)
    reason = refusal(outcome)
    if reason and results and not outcome.reason:
        return f"subject-{outcome.rc}: {', '.join(sorted(results))}"
    return _NUMBER.sub("..", reason)


#: Called with (phase, index of the first case in work).
Progress = Callable[[int, int], None]


def _no_progress(phase: int, index: int) -> None:
    """For runs that nobody watches."""


class CampaignLoop:
    """Subject and oracle, and the loop that compares them."""

    def __init__(
        self,
        subject: Subject,
        oracle: Oracle,
        progress: Progress = _no_progress,
        others: Sequence[Oracle] = (),
    ) -> None:
        self.subject = subject
        self.oracle = oracle
        self._panel = Panel(oracle, others) if others else None
        #: Buckets whose findings need no description any more; their cases are counted.
        self.known: frozenset[Bucket] = frozenset()
        self._progress = progress

    def run_batch(self, number: int, cases: Sequence[Case], first: int = 0) -> BatchResult:
        """Run cases of batch `number`, from place `first` on; reports progress every CHUNK cases."""
        result = BatchResult(number, len(cases))
        subject_run, oracle_run, progress = self.subject.run, self.oracle.run, self._progress
        for offset in range(0, len(cases), CHUNK):
            part = cases[offset : offset + CHUNK]
            start = first + offset
            progress(PHASE_SUBJECT, start)
            outcomes = subject_run(part)
            live = [i for i, outcome in enumerate(outcomes) if outcome.rc in _DONE and not outcome.crash]
            add_cells(result.cells, part, outcomes, start)
            progress(PHASE_ORACLE, start)
            if len(live) != len(part):
                self._add_refused(result, start, part, outcomes)
            if part[0].path is not None:
                self._add_results(result, start, part, outcomes)
            if self._panel is not None:
                self._rule(result, start, part, outcomes, live)
                continue
            if part[0].path is not None:
                live = self._judged(result, start, part, live)
            answers = oracle_run(part if len(live) == len(part) else [part[i] for i in live])
            self._compare(result, start, part, outcomes, live, answers)
        return result

    @staticmethod
    def _add_results(
        result: BatchResult, start: int, part: Sequence[Case], outcomes: Sequence[Outcome]
    ) -> None:
        """Count the results of cases of exit paths."""
        for index, (case, outcome) in enumerate(zip(part, outcomes, strict=True), start):
            for name in result_of(outcome):
                key = case.path or "", name
                if key not in result.results:
                    result.note(RESULT, " ".join(key), index)
                result.results[key] = result.results.get(key, 0) + 1

    def _judged(
        self, result: BatchResult, start: int, part: Sequence[Case], live: Sequence[int]
    ) -> list[int]:
        """Those of `live` that the oracle can judge."""
        judged = []
        for i in live:
            try:
                self.oracle.check(part[i])
            except UnsupportedCaseError as error:
                reason = f"{self.oracle.name}: {_NUMBER.sub('..', str(error))}"
                result.skip(reason, start + i)
            else:
                judged.append(i)
        return judged

    def run_carefully(
        self, number: int, cases: Sequence[Case], excluded: frozenset[int], first: int = 0
    ) -> BatchResult:
        """Run the cases one by one, without those at `excluded` places; exceptions become findings."""
        result = BatchResult(number, len(cases) - len(excluded))
        for index, case in enumerate(cases, first):
            if index in excluded:
                continue
            try:
                one = self.run_batch(number, (case,), index)
            except Exception:  # noqa: BLE001 - whatever a part of the loop raises is a finding about it
                lines = traceback.format_exc(limit=-6).strip()
                self._add_crash(result, index, case, lines)
                continue
            self.merge(result, one)
        return result

    def _add_crash(self, result: BatchResult, index: int, case: Case, lines: str) -> None:
        """Something other than the subject's own code raised: the oracle or the comparison."""
        difference = Difference(self.oracle.name, "crash", "", lines)
        sentence = f"{self.oracle.name} crashed"
        finding = Finding("", "crash", FAILED, result.number, index, case, (difference,), sentence=sentence)
        result.add_failed_cell(finding)
        result.add(finding)

    @staticmethod
    def merge(result: BatchResult, one: BatchResult) -> None:
        """Add the account of other cases of the same batch, but for their number."""
        result.agreed += one.agreed
        add_tallies(result.cells, one.cells)
        for name in ("skipped", "results", "verdicts", "fields"):
            add_counts(getattr(result, name), getattr(one, name))
        new = [finding for finding in one.findings if finding.bucket not in result.bucket_cases]
        result.findings.extend(new)
        for (kind, verdict), index in one.firsts.items():
            result.note(kind, verdict, index)
        for bucket, count in one.bucket_cases.items():
            result.bucket_cases[bucket] = result.bucket_cases.get(bucket, 0) + count

    def finding_of(self, case: Case) -> Finding | None:
        """What a case is a finding of, whatever is known; None if it is none (any more)."""
        known, self.known = self.known, frozenset()
        try:
            findings = self.run_carefully(0, (case,), frozenset()).findings
        finally:
            self.known = known
        return findings[0] if findings else None

    def _add_refused(
        self, result: BatchResult, start: int, part: Sequence[Case], outcomes: Sequence[Outcome]
    ) -> None:
        """Account for what the subject refused or crashed on; the oracle is not asked."""
        for i, outcome in enumerate(outcomes):
            if outcome.rc in _DONE and not (outcome.crash or outcome.hang):
                continue
            if outcome.crash or outcome.hang:
                verdict = judge(part[i], outcome, outcome, self.oracle)
                result.cells[cell_of(part[i], outcome)].findings += 1
                self._report(result, start + i, part[i], outcome, None, verdict.differences, FAILED)
            elif reason := skip_reason(outcome):
                result.skip(reason, start + i)

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
        oracle, verdicts = self.oracle, result.verdicts
        name = oracle.name
        for i, answer in zip(live, answers, strict=True):
            outcome = outcomes[i]
            if not (start + i) % SAMPLE:
                self._sample(result, part[i], outcome, [(oracle, answer)])
            if agree(outcome, answer) or (verdict := judge(part[i], outcome, answer, oracle)).kind == AGREE:
                agreed += 1
                key = name, outcome.leaf, AGREED
                verdicts[key] = verdicts.get(key, 0) + 1
            elif verdict.kind == SKIPPED:
                result.skip(verdict.reason, start + i)
                if not verdict.reason.startswith(LEFT):
                    count_view(verdicts, name, outcome.leaf, verdict.reason)
            else:
                self._blame(result, start + i, part[i], outcome, answer, verdict)
        result.agreed += agreed

    def _blame(
        self, result: BatchResult, index: int, case: Case, outcome: Outcome, answer: Outcome, verdict: Verdict
    ) -> None:
        """Account for a disagreement; of several instructions, of the first one that has it."""
        cell, leaf = result.cells[cell_of(case, outcome)], outcome.leaf
        step = first_disagreement(case, self.subject, self.oracle) if has_steps(case) else None
        if step is not None:
            case, outcome, answer, verdict = step
        explained = verdict.kind == SKIPPED
        count_view(result.verdicts, self.oracle.name, leaf, verdict.reason if explained else OBJECTS)
        if explained:
            result.skip(verdict.reason, index)
            return
        cell.findings += 1
        self._report(result, index, case, outcome, answer, verdict.differences, ALONE)

    @staticmethod
    def _sample(result: BatchResult, case: Case, outcome: Outcome, answers: Answers) -> None:
        """Count for which fields of a case the oracles vouch, unless nothing was done."""
        if not left_before(case, outcome):
            count_fields(result.fields, case, outcome, answers)

    def _rule(
        self,
        result: BatchResult,
        start: int,
        part: Sequence[Case],
        outcomes: Sequence[Outcome],
        live: Sequence[int],
    ) -> None:
        """Compare with all oracles of the panel."""
        panel = self._panel
        if panel is None:
            raise ValueError("there is only one oracle")
        cases, subjects = [part[i] for i in live], [outcomes[i] for i in live]
        rulings = panel.weigh(cases, subjects, self._first_answers(cases))
        for i, (ruling, answers) in zip(live, rulings, strict=True):
            for name, reason in ruling.views:
                count_view(result.verdicts, name, outcomes[i].leaf, reason)
            if not (start + i) % SAMPLE:
                self._sample(result, part[i], outcomes[i], answers)
            if ruling.kind == AGREE:
                result.agreed += 1
            elif ruling.kind == SKIPPED:
                result.skip(_NUMBER.sub("..", ruling.reason), start + i)
            elif reason := self._step_reason(part[i]):
                result.skip(reason, start + i)
            else:
                who = SPLIT if ruling.split else ALONE
                result.cells[cell_of(part[i], outcomes[i])].findings += 1
                sentence = ruling.sentence(self.subject.name)
                answer = objecting(ruling, answers)
                self._report(
                    result, start + i, part[i], outcomes[i], answer, ruling.differences, who, sentence
                )

    def _step_reason(self, case: Case) -> str:
        """What explains the first of several instructions that ends differently; empty if nothing does."""
        step = first_disagreement(case, self.subject, self.oracle) if has_steps(case) else None
        return step.verdict.reason if step is not None and step.verdict.kind == SKIPPED else ""

    def _first_answers(self, cases: Sequence[Case]) -> list[Outcome | None]:
        """What the first oracle says, None for cases of exit paths that it cannot take."""
        answers: list[Outcome | None] = [None] * len(cases)
        taken = []
        for i, case in enumerate(cases):
            if case.path is not None:
                try:
                    self.oracle.check(case)
                except UnsupportedCaseError:
                    continue
            taken.append(i)
        for i, answer in zip(taken, self.oracle.run([cases[i] for i in taken]), strict=True):
            answers[i] = answer
        return answers

    def _report(
        self,
        result: BatchResult,
        index: int,
        case: Case,
        outcome: Outcome,
        answer: Outcome | None,
        differences: tuple[Difference, ...],
        who: str,
        sentence: str = "",
    ) -> None:
        """Count a finding; the first of its bucket is described, unless the campaign has it already."""
        kind = primary_kind(differences)
        bucket = Bucket(outcome.leaf, place_of(case), kind, who)
        result.note(IN_FINDING, bucket.name, index)
        if bucket in result.bucket_cases or bucket in self.known:
            result.bucket_cases[bucket] = result.bucket_cases.get(bucket, 0) + 1
            return
        if answer is None:
            sentence = f"{self.subject.name} failed: {kind}"
        else:
            sentence = sentence or f"{self.subject.name} and {self.oracle.name} disagree: {kind}"
        leaf = outcome.leaf
        result.add(
            Finding(leaf, kind, who, result.number, index, case, differences, outcome, answer, sentence)
        )
