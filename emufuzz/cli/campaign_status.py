"""A campaign as its directory has it: read at one moment, as values and as lines for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from emufuzz.cli.screen.measure import Growth
from emufuzz.cli.screen.skips import skips_of
from emufuzz.cli.screen.text import BARS, percent, plural, sparkline
from emufuzz.fuzz.accounting import coverable
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.store import StoreView
from emufuzz.fuzz.store.lock import driver_of
from emufuzz.fuzz.store.records import STATES
from emufuzz.report.plain import duration, printable

#: As FORMAT of `--log-json`.
FORMAT: Final = 1
#: Points of growth that are given, and columns of its picture.
_POINTS: Final = 200
_COLUMNS: Final = 60
#: Reasons that are listed for people.
_REASONS: Final = 20
_LABEL: Final = 10


class FindingCounts(msgspec.Struct):
    """How many findings there are: `states` and `verdicts` by name, `cases` that fell into their buckets."""

    total: int
    cases: int
    states: dict[str, int]
    verdicts: dict[str, int]
    shrunk: int
    unshrunk: int


class Coverage(msgspec.Struct):
    """(Implemented leaf, mode) pairs that occurred, of those that can."""

    covered: int
    coverable: int


class Run(msgspec.Struct):
    """A run: `state` is `running`, `done`, `stopped` or `killed`."""

    started: str
    seconds: float
    workers: str
    versions: dict[str, str]
    state: str


class Point(msgspec.Struct):
    """How far the campaign was after `seconds` of all its runs."""

    cases: int
    seconds: float
    covered: int
    findings: int


class Status(msgspec.Struct):
    """A campaign at one moment; `driver` is the process that runs it, 0 if unknown, None if nobody does."""

    format: int
    directory: str
    config: CampaignConfig
    running: bool
    driver: int | None
    budget: int | None
    cases: int
    compared: int
    agreed: int
    skipped: dict[str, int]
    results: dict[str, dict[str, int]]
    findings: FindingCounts
    coverage: Coverage
    elapsed: float
    rate: float
    runs: list[Run]
    growth: list[Point]


def read_status(directory: Path) -> Status:
    """The status of the campaign in a directory; nothing is changed.

    Raises:
        StoreError: There is no campaign, or it is damaged or cannot be read.
    """
    view = StoreView(directory)
    try:
        driver = driver_of(directory)  # one that starts or ends meanwhile counts as running
        with view.snapshot():
            return _status(view, driver)
    finally:
        view.close()


def _status(view: StoreView, driver: int | None) -> Status:
    totals, config, elapsed = view.totals(), view.config(), view.seconds()
    runs = [msgspec.convert(run, Run) for run in view.runs()]
    if driver is None:
        driver = driver_of(view.directory)
    for run in runs:
        if run.state == "running" and driver is None:
            run.state = "killed"
    return Status(
        format=FORMAT,
        directory=str(view.directory),
        config=config,
        running=driver is not None,
        driver=driver,
        budget=view.budget(),
        cases=totals.cases,
        compared=totals.compared,
        agreed=totals.agreed,
        skipped=dict(sorted(totals.skipped.items())),
        results=totals.summary().get("results", {}),
        findings=_finding_counts(view),
        coverage=Coverage(totals.covered(), coverable(config.modes)),
        elapsed=round(elapsed, 3),
        rate=round(totals.cases / elapsed, 1) if elapsed > 0 else 0.0,
        runs=runs,
        growth=[Point(*point) for point in _thinned(view.history())],
    )


def _finding_counts(view: StoreView) -> FindingCounts:
    """The counts, without reading the findings themselves."""
    rows = view.rows("SELECT state, verdict, cases, shrunk IS NOT NULL, passes IS NULL FROM findings")
    states = Counter(str(row[0]) for row in rows)
    return FindingCounts(
        total=len(rows),
        cases=sum(row[2] for row in rows),
        states={
            state: states[state] for state in (*STATES, *sorted(set(states) - set(STATES))) if states[state]
        },
        verdicts=dict(sorted(Counter(str(row[1]) for row in rows).items())),
        shrunk=sum(row[3] for row in rows),
        unshrunk=sum(row[4] for row in rows),
    )


def _thinned(history: Sequence[tuple[int, float, int, int]]) -> list[tuple[int, float, int, int]]:
    """At most _POINTS entries, the first and the last among them."""
    if len(history) <= _POINTS:
        return list(history)
    return [history[i * (len(history) - 1) // (_POINTS - 1)] for i in range(_POINTS)]


def status_lines(status: Status, bars: str = BARS) -> Iterator[str]:
    """The status for people; `bars` are the columns of pictures, low to high."""
    for line in _lines(status, bars):
        yield printable(line)


def _lines(status: Status, bars: str) -> Iterator[str]:
    config = status.config
    yield _row("campaign", f"{status.directory}: {config.subject} against {', '.join(config.oracles)}")
    yield _row("", f"seed {config.seed}, modes {','.join(config.modes)}")
    if config.paths:
        yield _row("", f"paths {','.join(config.paths)}")
    if config.bug:
        yield _row("", f"seeded bug {config.bug}")
    yield _row("state", _state(status))
    yield _row("cases", _cases(status))
    yield _row("", f"{status.compared:,} compared, {status.agreed:,} of them agreed")
    yield _row("coverage", _coverage(status))
    yield from _growth(status, bars)
    yield from _findings(status.findings)
    yield from _skipped(status)
    yield from _runs(status.runs)


def _row(label: str, value: str) -> str:
    return f"{label:<{_LABEL}}{value}"


def _state(status: Status) -> str:
    elapsed = f"{duration(status.elapsed)} in {plural(len(status.runs), 'run')}"
    if not status.running:
        return f"not running; {elapsed}"
    return f"running{f' (process {status.driver})' if status.driver else ''}; {elapsed}"


def _cases(status: Status) -> str:
    share = "" if status.budget is None else f" of {status.budget:,} ({percent(status.cases, status.budget)})"
    return f"{status.cases:,}{share}, {status.rate:,.0f}/s"


def _coverage(status: Status) -> str:
    covered, most = status.coverage.covered, status.coverage.coverable
    return f"{covered:,} of {most:,} leaves x modes ({percent(covered, most)})"


def _growth(status: Status, bars: str) -> Iterator[str]:
    """How coverage grew."""
    if len(status.growth) > 1:
        growth = Growth((point.seconds, point.covered) for point in status.growth)
        yield _row("growth", sparkline(growth.columns(_COLUMNS), bars))


def _findings(counts: FindingCounts) -> Iterator[str]:
    shown = f" ({_named(counts.states)}; {_named(counts.verdicts)})" if counts.total else ""
    yield _row("findings", f"{counts.total:,}{shown}")
    if counts.total:
        yield _row("", f"{counts.cases:,} cases, {counts.shrunk:,} shrunk, {counts.unshrunk:,} to shrink")


def _named(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in counts.items())


def _skipped(status: Status) -> Iterator[str]:
    skips = skips_of(status.skipped, status.config.oracles)
    skipped = sum(skip.cases for skip in skips)
    yield _row("skipped", f"{skipped:,} ({percent(skipped, status.cases)})")
    for skip in skips[:_REASONS]:
        yield f"{skip.cases:>14,}  {skip.kind:<8} {skip.reason}"
    if len(skips) > _REASONS:
        yield f"{'':>14}  and {plural(len(skips) - _REASONS, 'more reason')} (--json lists all)"


def _runs(runs: Iterable[Run]) -> Iterator[str]:
    for i, run in enumerate(runs, 1):
        yield _row(f"run {i}", f"{run.started}  {duration(run.seconds)}  {run.state}  workers {run.workers}")
        yield _row("", f"  {_versions(run.versions)}")


def _versions(versions: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in versions.items())
