"""What there is to show of a campaign at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from emufuzz.cli.screen.measure import Growth, Rate, Restarts
from emufuzz.cli.screen.skips import Health, Skip, health_of, skips_of
from emufuzz.fuzz.accounting import coverable
from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.loop import PHASES
from emufuzz.fuzz.tasks import WorkerState


class Subject(NamedTuple):
    """What is fuzzed, and where it is kept: what does not change during a run.

    Attributes:
        directory: The campaign's.
        config: What the campaign is.
        versions: What this run works with.
        limits: When it ends.
    """

    directory: str
    config: CampaignConfig
    versions: dict[str, str]
    limits: Limits


class WorkerRow(NamedTuple):
    """A worker: its state in words, None where there is nothing to say.

    Attributes:
        name: Where it is.
        doing: `starting`, `idle`, `batch` or `shrink`.
        batch: The batch in work.
        case: The place in it, or how many cases shrinking has tried.
        phase: Who has the case now: one of PHASES.
        rss: Resident memory in bytes; 0 if unknown.
        restarts: How often the worker of this place was replaced.
    """

    name: str
    doing: str
    batch: int | None
    case: int | None
    phase: str | None
    rss: int
    restarts: int


@dataclass(frozen=True, slots=True)
class View:
    """A campaign at one moment. Times are in seconds, rates in cases per second.

    Attributes:
        subject: What is fuzzed.
        elapsed, total_elapsed: Time of this run, and of all runs.
        cases, earlier_cases: Cases of all runs, and of those before this one.
        rate_now, rate: Throughput in the last half minute, and of this run.
        left: Time until the run ends at this rate; None if that is not known.
        compared, agreed: Cases that were compared, and that agreed.
        skips: Why others were not.
        oracles: How each oracle does.
        covered, coverable: (implemented leaf, mode) pairs.
        coverage: Its growth.
        since_coverage, since_finding: Time since it grew, and since a bucket was new; None if unknown.
        buckets, new: Findings of all runs, and of this one.
        verdicts: Verdict -> findings.
        to_shrink: Findings that wait for being shrunk, or are at it.
        workers: Who works.
        restarts: How many were replaced.
    """

    subject: Subject
    elapsed: float
    total_elapsed: float
    cases: int
    earlier_cases: int
    rate_now: float
    rate: float
    left: float | None
    compared: int
    agreed: int
    skips: tuple[Skip, ...]
    oracles: tuple[Health, ...]
    covered: int
    coverable: int
    coverage: Growth
    since_coverage: float | None
    since_finding: float | None
    buckets: int
    new: int
    verdicts: dict[str, int]
    to_shrink: int
    workers: tuple[WorkerRow, ...]
    restarts: int

    @property
    def budget(self) -> int | None:
        """Cases that the campaign shall have."""
        return self.subject.limits.cases

    @property
    def skipped(self) -> int:
        """Cases that were skipped."""
        return sum(skip.cases for skip in self.skips)


class Watch:
    """Looks at a campaign from time to time, and remembers what only time tells."""

    def __init__(self, subject: Subject, history: list[tuple[int, float, int, int]]) -> None:
        """Begin.

        Args:
            subject: What is fuzzed.
            history: The campaign's growth so far, as its store has it.
        """
        self._subject = subject
        self._coverable = coverable(subject.config.modes)
        self._rate = Rate()
        self._restarts = Restarts()
        self._coverage = Growth((seconds, covered) for _, seconds, covered, _ in history)
        self._findings = Growth((seconds, findings) for _, seconds, _, findings in history)

    def begin(self, campaign: Campaign) -> None:
        """Note where the campaign is before its run."""
        earlier, seconds = campaign.earlier, campaign.earlier_seconds
        self._coverage.add(seconds, earlier.covered())
        self._findings.add(seconds, len(earlier.bucket_cases))

    def sample(self, campaign: Campaign) -> None:
        """Take the campaign's pulse; cheap, and may be done at any time."""
        self._rate.add(campaign.elapsed, campaign.totals.cases)

    def view(self, campaign: Campaign) -> View:
        """What there is to show now."""
        totals, elapsed, config = campaign.totals, campaign.elapsed, self._subject.config
        total_elapsed = campaign.earlier_seconds + elapsed
        covered, buckets = totals.covered(), len(totals.bucket_cases)
        self._coverage.add(total_elapsed, covered)
        self._findings.add(total_elapsed, buckets)
        states = campaign.pool.states()
        self._restarts.see(states)
        skips = skips_of(totals.skipped, config.oracles)
        done = totals.cases - campaign.earlier.cases
        rate = done / elapsed if elapsed > 0 else 0.0
        now = self._rate.per_second()
        return View(
            subject=self._subject,
            elapsed=elapsed,
            total_elapsed=total_elapsed,
            cases=totals.cases,
            earlier_cases=campaign.earlier.cases,
            rate_now=now,
            rate=rate,
            left=self._left(totals.cases, elapsed, now or rate),
            compared=totals.compared,
            agreed=totals.agreed,
            skips=skips,
            oracles=health_of(config.oracles, self._subject.versions, skips, totals.compared),
            covered=covered,
            coverable=self._coverable,
            coverage=self._coverage,
            since_coverage=_since(total_elapsed, self._coverage.at),
            since_finding=_since(total_elapsed, self._findings.at),
            buckets=buckets,
            new=len(campaign.new),
            verdicts=_verdicts(campaign),
            to_shrink=campaign.shrinking + sum(state.doing == "shrink" for state in states),
            workers=tuple(map(_row, states, self._restarts.counts)),
            restarts=campaign.pool.restarts,
        )

    def _left(self, cases: int, elapsed: float, rate: float) -> float | None:
        """Seconds until the first limit is met at this rate."""
        limits = self._subject.limits
        ends = []
        if limits.seconds is not None:
            ends.append(limits.seconds - elapsed)
        if limits.cases is not None and rate > 0:
            ends.append((limits.cases - cases) / rate)
        return max(min(ends), 0.0) if ends else None


def _row(state: WorkerState, restarts: int) -> WorkerRow:
    batch, case = (None if value < 0 else value for value in (state.batch, state.index))
    phase = PHASES[state.phase] if 0 <= state.phase < len(PHASES) else None
    return WorkerRow(state.name, state.doing, batch, case, phase, state.rss, restarts)


def _since(now: float, then: float | None) -> float | None:
    return None if then is None else max(now - then, 0.0)


def _verdicts(campaign: Campaign) -> dict[str, int]:
    found: dict[str, int] = {}
    for bucket in campaign.totals.bucket_cases:
        found[bucket.verdict] = found.get(bucket.verdict, 0) + 1
    return found
