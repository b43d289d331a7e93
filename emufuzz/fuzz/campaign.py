"""A campaign: batches and findings to be shrunk go to workers; what comes back is merged in order and kept.

What is found depends on the configuration and the number of cases only: batches are merged in their
order whatever worker finishes first, and a bucket keeps its lowest-numbered case.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from emufuzz.fuzz.accounting import BatchResult, Totals
from emufuzz.fuzz.finding import FAILED, Finding
from emufuzz.fuzz.finding_json import finding_from_obj
from emufuzz.fuzz.generate import Generator
from emufuzz.fuzz.guided import epochs
from emufuzz.fuzz.guided.generate import GuidedGenerator
from emufuzz.fuzz.guided.guide import Guide
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.loop import PHASE_ORACLE, PHASES
from emufuzz.fuzz.schedule import BATCH_SIZE, Merged, Schedule
from emufuzz.fuzz.shrink import Limits as ShrinkLimits
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.store import Store
from emufuzz.fuzz.store.corpus import corpus_of
from emufuzz.fuzz.tasks import BatchTask, CorpusWanted, Done, Failure, Pool, Setup, ShrinkTask, Task
from emufuzz.oracle.compare import Difference

#: Seconds between two looks at the workers when none reports.
_TICK: Final = 0.25
#: Seconds between two entries of the history.
_HISTORY: Final = 30.0
#: Workers that a finding may take with it before it is left as it is.
_SHRINK_ATTEMPTS: Final = 2


@dataclass(frozen=True, slots=True)
class Limits:
    """When a campaign ends: at so many cases in all, or after so many seconds of this run."""

    cases: int | None = None
    seconds: float | None = None


class Campaign:
    """The driver: hands out tasks, merges results in order, keeps them in the store."""

    def __init__(
        self,
        setup: Setup,
        limits: Limits,
        pool: Pool,
        store: Store | None = None,
        shrink: ShrinkLimits | None = None,
    ) -> None:
        """Set a campaign up; with a store it goes on where that ends.

        Args:
            setup: What the workers work with.
            limits: When to end.
            pool: The workers.
            store: Where to keep what is found; nowhere without one.
            shrink: How far to shrink findings; not at all without.
        """
        self._setup = setup
        self._limits = limits
        self.pool = pool
        self._store = store
        self._shrink = shrink
        self.totals = Totals() if store is None else store.totals()
        self.earlier = Totals() if store is None else store.totals()
        self.earlier_seconds = 0.0 if store is None else store.seconds()
        #: Findings of this run, as they were found, in their order.
        self.new: list[Finding] = []
        #: Called with whatever a worker says, after it has been dealt with.
        self.on_said: Callable[[Done | Failure], None] = lambda _: None
        start = (0, 0) if store is None else store.progress()
        self._guide = _guide(setup, store)
        window = None if self._guide is None else epochs.allowed
        self._schedule = Schedule(start, limits.cases, pool.size, window)
        self._to_shrink = self._unshrunk()
        self._busy = 0
        self._started = self._recorded = time.monotonic()

    def _unshrunk(self) -> list[ShrinkTask]:
        """What an earlier run left to be shrunk."""
        if self._store is None or self._shrink is None:
            return []
        return [
            ShrinkTask(finding_from_obj(record.document), self._shrink) for record in self._store.unshrunk()
        ]

    @property
    def elapsed(self) -> float:
        """Seconds since this run began."""
        return time.monotonic() - self._started

    @property
    def shrinking(self) -> int:
        """Findings that wait for being shrunk."""
        return len(self._to_shrink)

    def run(self, on_tick: Callable[[Campaign], None] = lambda _: None) -> Totals:
        """Run to the limits; `on_tick` is called several times a second.

        A KeyboardInterrupt stops the workers and passes on; `totals` then hold what was merged.
        """
        self._started = self._recorded = time.monotonic()
        state = "failed"
        try:
            self.pool.start()
            while self._feed():
                for said in self.pool.poll(_TICK):
                    self._hear(said)
                    self.on_said(said)
                self._merge()
                self._grow()
                on_tick(self)
            self.pool.close()
            state = "done"
        except KeyboardInterrupt:
            state = "stopped"
            raise
        finally:
            if state != "done":
                self.pool.kill()
            self._finish(state)
        return self.totals

    def _finish(self, state: str) -> None:
        if self._store is not None and state != "failed":
            self._grow(at_once=True)
            self._store.finish(state, self.elapsed)

    def _feed(self) -> bool:
        """Give idle workers tasks; False when nothing is left to do or to wait for."""
        for worker in self.pool.idle():
            task = self._next_task()
            if task is None:
                break
            self.pool.submit(worker, task)
            self._busy += 1
        more = self._may_start() and self._schedule.more()
        return bool(self._busy or self._to_shrink or self._schedule.waiting or more)

    def _may_start(self) -> bool:
        seconds = self._limits.seconds
        return seconds is None or self.elapsed < seconds

    def _next_task(self) -> Task | None:
        """Findings first: there are few, and they are what a user waits for."""
        if self._to_shrink:
            return self._to_shrink.pop(0)
        return self._schedule.take(frozenset(self.totals.bucket_cases), new=self._may_start())

    def _hear(self, said: Done | Failure) -> None:
        self._busy -= 1
        task = said.task
        if isinstance(task, ShrinkTask):
            self._shrunk(task, said)
        elif isinstance(said, Failure):
            if said.reason == "lost":
                self._schedule.again(task)
            elif self._schedule.failed(said, task) and said.index >= task.first:
                self._schedule.blame(task.number, self._incident(said, task))
        elif isinstance(said.value, CorpusWanted) and self._guide is not None:
            self._schedule.again(replace(task, corpus=self._guide.snapshot(said.value.epoch)))
        elif isinstance(said.value, BatchResult):
            self._schedule.done(replace(task, corpus=None), said.value)

    def _shrunk(self, task: ShrinkTask, said: Done | Failure) -> None:
        """Keep a shrunk finding, or try once more if a worker ended over it."""
        bucket = task.finding.bucket
        if isinstance(said, Failure):
            if task.attempt + 1 < _SHRINK_ATTEMPTS:
                self._to_shrink.append(replace(task, attempt=task.attempt + 1))
            elif self._store is not None:
                self._store.not_shrunk(bucket, f"shrinking it ends in a {said.reason}: {_last(said.detail)}")
        elif self._store is not None and isinstance(said.value, Shrunk):
            self._store.save_shrunk(bucket, said.value)

    def _incident(self, failure: Failure, task: BatchTask) -> Finding:
        """The finding that a hang or death is, with the case that was in work."""
        generator = self._generator(task.number)
        case = generator.cases(failure.index + 1)[failure.index]
        kind = "hang" if failure.reason == "hang" else "crash"
        who = PHASES[failure.phase]
        shown = ("", failure.detail) if failure.phase == PHASE_ORACLE else (failure.detail, "")
        difference = Difference(who, kind, *shown)
        sentence = f"the {who} did not survive the case: {failure.detail}"
        leaf = generator.leaf_of(failure.index)
        return Finding(leaf, kind, FAILED, task.number, failure.index, case, (difference,), sentence=sentence)

    def _generator(self, number: int) -> Generator | GuidedGenerator:
        if self._guide is not None:
            return self._guide.generator(number)
        return generator_of(self._setup.seed, number, self._setup.options)

    def _merge(self) -> None:
        while (merged := self._schedule.merged()) is not None:
            self._keep(merged)

    def _keep(self, merged: Merged) -> None:
        """Count a batch and keep its new findings."""
        result = merged.result
        for incident in merged.incidents:
            result.add_incident(incident)
        fresh = self.totals.merge(result)
        growth = None
        if self._guide is not None:
            whole = merged.first + merged.cases == BATCH_SIZE
            growth = self._guide.merge(result, whole=whole)
        if self._store is not None:
            self._store.merge(result, merged.first, merged.cases, fresh, self.elapsed, growth)
        self.new.extend(fresh)
        if self._shrink is not None:
            self._to_shrink.extend(ShrinkTask(finding, self._shrink) for finding in fresh)

    def _grow(self, *, at_once: bool = False) -> None:
        """Record the growth from time to time."""
        now = time.monotonic()
        if self._store is None or (not at_once and now - self._recorded < _HISTORY):
            return
        self._recorded = now
        totals = self.totals
        seconds = self.earlier_seconds + self.elapsed
        self._store.grow(totals.cases, seconds, totals.covered(), len(totals.bucket_cases))


def _guide(setup: Setup, store: Store | None) -> Guide | None:
    """The corpus of a guided campaign, with what its file has."""
    if not setup.guided:
        return None
    if store is None:
        return Guide(setup.seed, setup.options)
    return Guide(setup.seed, setup.options, corpus_of(store), store.cells())


def _last(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]
