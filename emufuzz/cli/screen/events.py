"""What `--log-json` writes, one object per line (docs/status.md), and what other outputs show as words."""

from __future__ import annotations

from typing import Final

import msgspec

from emufuzz.cli.screen.view import View
from emufuzz.fuzz.accounting import Totals
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.finding import Bucket, Finding
from emufuzz.fuzz.loop import PHASES
from emufuzz.fuzz.shrink import Shrunk as ShrinkResult
from emufuzz.fuzz.shrink import non_default_fields
from emufuzz.fuzz.tasks import BatchTask, Failure, Task
from emufuzz.report.disasm import mnemonic

#: Raised when a member changes its meaning or goes away; new members and events may come at any time.
FORMAT: Final = 1


class Event(msgspec.Struct, tag_field="event", tag=str.lower):
    """Something that happened `elapsed` seconds after this run began."""

    elapsed: float


class Start(Event):
    """The run begins."""

    format: int
    directory: str
    started: str
    config: CampaignConfig
    versions: dict[str, str]
    workers: int
    cases: int
    budget: int | None
    seconds: float | None


class Worker(msgspec.Struct):
    """A worker, as in `emufuzz.cli.screen.view.WorkerRow`."""

    name: str
    doing: str
    batch: int | None
    case: int | None
    phase: str | None
    rss: int
    restarts: int


class Progress(Event):
    """How far the campaign is."""

    cases: int
    budget: int | None
    left: float | None
    rate: float
    rate_now: float
    compared: int
    agreed: int
    skipped: int
    covered: int
    coverable: int
    findings: int
    new: int
    to_shrink: int
    restarts: int
    workers: list[Worker]


class Found(Event, tag="finding"):
    """A bucket that the campaign did not have."""

    name: str
    leaf: str
    place: str
    kind: str
    verdict: str
    batch: int
    case: int
    instruction: str
    sentence: str
    file: str

    @property
    def text(self) -> str:
        """The event for people."""
        return f"{self.leaf or '?'} in {self.place}: {self.kind}: {self.instruction}"


class Shrunk(Event):
    """A finding was shrunk; `fields` and `instructions` are what is left of its case."""

    name: str
    complete: bool
    reason: str
    fields: int
    instructions: int
    instruction: str
    file: str

    @property
    def text(self) -> str:
        """The event for people."""
        left = f"{self.instruction}, fields that matter: {self.fields}"
        return f"{self.name}: {left}{f' ({self.reason})' if self.reason else ''}"


class Restart(Event):
    """A worker was replaced.

    `reason` is that of a Failure, or `idle` if it had nothing to do; `shrinking` names the finding that it
    was shrinking.
    """

    reason: str
    batch: int | None
    case: int | None
    phase: str | None
    shrinking: str | None
    detail: str

    @property
    def text(self) -> str:
        """The event for people."""
        return f"worker: {self.reason}{_where(self)}{f': {self.detail}' if self.detail else ''}"


class Retry(Event):
    """A worker reported an error of the loop; the batch is done again, case by case."""

    batch: int | None
    case: int | None
    phase: str | None
    shrinking: str | None
    detail: str

    @property
    def text(self) -> str:
        """The event for people."""
        return f"error{_where(self)}: {self.detail}"


class Done(Event):
    """The run ended: `state` is `done`, `stopped` (by a signal) or `failed`, with the reason.

    The counts are those of all runs.
    """

    state: str
    reason: str
    cases: int
    compared: int
    agreed: int
    skipped: dict[str, int]
    results: dict[str, dict[str, int]]
    covered: int
    coverable: int
    findings: int
    new: int
    unshrunk: int
    restarts: int


#: Every event, for those who read them.
EVENTS: Final = (Start, Progress, Found, Shrunk, Restart, Retry, Done)
Incident = Found | Shrunk | Restart | Retry


def _where(event: Restart | Retry) -> str:
    if event.shrinking is not None:
        return f" while it shrank {event.shrinking}"
    if event.batch is None:
        return ""
    return f" in batch {event.batch} at case {event.case} ({event.phase})"


def start_of(view: View, started: str, workers: int) -> Start:
    """The beginning of a run."""
    subject = view.subject
    limits = subject.limits
    return Start(
        elapsed=0.0,
        format=FORMAT,
        directory=subject.directory,
        started=started,
        config=subject.config,
        versions=subject.versions,
        workers=workers,
        cases=view.cases,
        budget=limits.cases,
        seconds=limits.seconds,
    )


def progress_of(view: View) -> Progress:
    """How far a campaign is."""
    return Progress(
        elapsed=_seconds(view.elapsed),
        cases=view.cases,
        budget=view.budget,
        left=None if view.left is None else _seconds(view.left),
        rate=round(view.rate, 1),
        rate_now=round(view.rate_now, 1),
        compared=view.compared,
        agreed=view.agreed,
        skipped=view.skipped,
        covered=view.covered,
        coverable=view.coverable,
        findings=view.buckets,
        new=view.new,
        to_shrink=view.to_shrink,
        restarts=view.restarts,
        workers=[Worker(*row) for row in view.workers],
    )


def found_of(elapsed: float, finding: Finding, file: str) -> Found:
    """A new finding and the file that it is exported to."""
    bucket = finding.bucket
    return Found(
        _seconds(elapsed),
        bucket.name,
        *bucket,
        finding.batch,
        finding.index,
        mnemonic(finding.case),
        finding.sentence,
        file,
    )


def shrunk_of(elapsed: float, bucket: Bucket, result: ShrinkResult, file: str) -> Shrunk:
    """What a finding was shrunk to."""
    case = result.finding.case
    return Shrunk(
        _seconds(elapsed),
        bucket.name,
        result.complete,
        result.reason,
        len(non_default_fields(case)),
        case.count,
        mnemonic(case),
        file,
    )


def failure_of(elapsed: float, failure: Failure) -> Restart | Retry:
    """A task that did not finish."""
    where = (*_place(failure), _last(failure.detail))
    if failure.reason == "error":
        return Retry(_seconds(elapsed), *where)
    return Restart(_seconds(elapsed), failure.reason, *where)


def idle_restart(elapsed: float) -> Restart:
    """A worker ended that had no task."""
    return Restart(_seconds(elapsed), "idle", None, None, None, None, "")


def done_of(view: View, totals: Totals, state: str, reason: str) -> Done:
    """The end of a run."""
    return Done(
        elapsed=_seconds(view.elapsed),
        state=state,
        reason=reason,
        cases=view.cases,
        compared=view.compared,
        agreed=view.agreed,
        skipped=dict(sorted(totals.skipped.items())),
        results=totals.summary().get("results", {}),
        covered=view.covered,
        coverable=view.coverable,
        findings=view.buckets,
        new=view.new,
        unshrunk=view.to_shrink,
        restarts=view.restarts,
    )


def _place(failure: Failure) -> tuple[int | None, int | None, str | None, str | None]:
    """Batch, case and phase, or the name of the finding in work."""
    task: Task = failure.task
    if isinstance(task, BatchTask):
        return task.number, failure.index, PHASES[failure.phase], None
    return None, None, None, task.finding.bucket.name


def _seconds(value: float) -> float:
    return round(value, 3)


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
