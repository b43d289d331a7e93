"""A campaign: numbered batches through workers, merged in order, findings kept, every case accounted for.

What is found depends on seed, options and the number of cases only: batches are merged in their
order whatever worker finishes first, and a bucket keeps its lowest-numbered case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from emufuzz.arch.leaves import LEAVES, leaf_rows
from emufuzz.fuzz.forms import forms
from emufuzz.fuzz.generate import Generator
from emufuzz.fuzz.loop import PHASE_ORACLE, PHASES, BatchResult, Finding
from emufuzz.fuzz.store import Store
from emufuzz.fuzz.workers import (
    WATCHDOG_SECONDS,
    Failure,
    Setup,
    Task,
    Worker,
    wait_for_any,
)
from emufuzz.oracle.compare import Difference

#: Cases per batch.
BATCH_SIZE: Final = 2048
#: Seconds between two looks at the workers when none reports.
_TICK: Final = 0.25


@dataclass(frozen=True, slots=True)
class Limits:
    """When a campaign ends: after so many cases or seconds, whichever comes first (None = no limit)."""

    cases: int | None = None
    seconds: float | None = None


@dataclass(slots=True)
class Totals:
    """The accounting: `cases` = `agreed` + all of `skipped` + all of `bucket_cases`."""

    cases: int = 0
    agreed: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    bucket_cases: dict[tuple[str, str, str], int] = field(default_factory=dict)
    coverage: dict[tuple[str, str], int] = field(default_factory=dict)
    findings: dict[tuple[str, str, str], Finding] = field(default_factory=dict)
    new: list[Finding] = field(default_factory=list)
    restarts: int = 0

    @property
    def compared(self) -> int:
        """Cases on which subject and oracle were compared to the end."""
        return self.agreed + sum(self.bucket_cases.values())

    @property
    def skipped_cases(self) -> int:
        """Cases that were skipped, whatever the reason."""
        return sum(self.skipped.values())

    def covered(self) -> int:
        """(implemented leaf, mode) pairs that occurred."""
        return sum(1 for leaf, _ in self.coverage if leaf in LEAVES and LEAVES[leaf].implemented)

    def merge(self, result: BatchResult) -> list[Finding]:
        """Add a batch; gives the findings of buckets that did not exist before."""
        self.cases += result.cases
        self.agreed += result.agreed
        _add(self.skipped, result.skipped)
        _add(self.bucket_cases, result.bucket_cases)
        _add(self.coverage, result.coverage)
        fresh = [f for f in result.findings if f.bucket not in self.findings]
        for finding in sorted(fresh, key=lambda f: f.index):
            self.findings[finding.bucket] = finding
        return fresh

    def summary(self) -> dict[str, Any]:
        """The accounting as JSON values."""
        buckets = sorted(self.bucket_cases.items())
        return {
            "cases": self.cases,
            "agreed": self.agreed,
            "skipped": dict(sorted(self.skipped.items())),
            "findings": [
                {"leaf": leaf, "mode": mode, "kind": kind, "cases": count}
                for (leaf, mode, kind), count in buckets
            ],
            "covered": self.covered(),
        }


def _add(total: dict[Any, int], part: dict[Any, int]) -> None:
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


class Campaign:
    """The driver: hands out batches, watches the workers, merges results in order."""

    def __init__(
        self,
        setup: Setup,
        limits: Limits,
        store: Store | None = None,
        *,
        workers: int = 1,
        watchdog: float = WATCHDOG_SECONDS,
    ) -> None:
        self.totals = Totals()
        self._setup = setup
        self._limits = limits
        self._store = store
        self._watchdog = watchdog
        self._wanted = workers
        self._workers: list[Worker] = []
        self._next = 0
        self._merged = 0
        self._results: dict[int, BatchResult] = {}
        self._repeat: list[Task] = []
        self._incidents: dict[int, list[Finding]] = {}
        self._deadline: float | None = None

    @property
    def workers_alive(self) -> int:
        """Workers that can take batches."""
        return sum(worker.ready for worker in self._workers)

    def run(self, on_tick: Callable[[Campaign], None] = lambda _: None) -> Totals:
        """Run to the limits; `on_tick` is called several times a second.

        A KeyboardInterrupt stops the workers and passes on; `totals` then hold what was merged.
        """
        started = time.monotonic()
        if self._limits.seconds is not None:
            self._deadline = started + self._limits.seconds
        try:
            self._workers = [self._start_worker() for _ in range(self._wanted)]
            while self._feed():
                wait_for_any(self._workers, _TICK)
                self._collect()
                on_tick(self)
        except BaseException:
            for worker in self._workers:
                worker.kill()
            raise
        for worker in self._workers:
            worker.close()
        return self.totals

    def _start_worker(self) -> Worker:
        return Worker(self._setup, self._watchdog)

    def _feed(self) -> bool:
        """Give idle workers batches; False when nothing is left to do or to wait for."""
        for worker in self._workers:
            if worker.ready and worker.task is None:
                task = self._repeat.pop(0) if self._repeat else self._new_task()
                if task is not None:
                    worker.submit(task)
        busy = any(worker.task is not None for worker in self._workers)
        return busy or bool(self._repeat) or self._more()

    def _more(self) -> bool:
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return False
        cases = self._limits.cases
        return cases is None or self._next * BATCH_SIZE < cases

    def _new_task(self) -> Task | None:
        if not self._more():
            return None
        number, size = self._next, BATCH_SIZE
        if self._limits.cases is not None:
            size = min(size, self._limits.cases - number * BATCH_SIZE)
        self._next += 1
        return Task(number, size)

    def _collect(self) -> None:
        for i, worker in enumerate(self._workers):
            said = worker.receive() or worker.check_hang()
            if isinstance(said, BatchResult):
                self._results[said.number] = said
            elif said is not None:
                self._handle(said)
                if said.reason != "error":
                    worker.kill()
                    self._workers[i] = self._start_worker()
                    self.totals.restarts += 1
        while self._merged in self._results:
            self._merge(self._results.pop(self._merged))
            self._merged += 1

    def _handle(self, failure: Failure) -> None:
        """Repeat a failed batch: first case by case, then without the case that failed again."""
        task = failure.task
        if task.careful:
            self._incidents.setdefault(task.number, []).append(self._incident(failure))
            excluded = task.excluded | {failure.index}
        else:
            excluded = frozenset()
        self._repeat.append(Task(task.number, task.size, careful=True, excluded=excluded))

    def _incident(self, failure: Failure) -> Finding:
        """The finding that a hang or death is, with the case that was in work."""
        setup = self._setup
        generator = Generator(setup.seed, failure.task.number, setup.options)
        case = generator.cases(failure.task.size)[failure.index]
        kind = "hang" if failure.reason == "hang" else "crash"
        who = PHASES[failure.phase]
        difference = Difference(
            who, kind, *(("", failure.detail) if failure.phase == PHASE_ORACLE else (failure.detail, ""))
        )
        leaf = generator.leaf_of(failure.index)
        verdict = f"the {who} did not survive the case: {failure.detail}"
        return Finding(
            leaf, case.mode, kind, failure.task.number, failure.index, case, (difference,), verdict=verdict
        )

    def _merge(self, result: BatchResult) -> None:
        for incident in self._incidents.pop(result.number, ()):
            result.cases += 1
            result.add(incident)
        result.findings.sort(key=lambda finding: finding.index)
        for finding in self.totals.merge(result):
            if self._store is None or self._store.save(finding):
                self.totals.new.append(finding)
