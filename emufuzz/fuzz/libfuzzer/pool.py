"""A pool whose batches are what libFuzzer makes, in processes that share a corpus.

A batch is a number of executions. A process that ends is replaced, and its batch goes on with what is left
of it. The case that it was at is tried again in a process of its own: if that fails too, it is a finding.
Findings are shrunk by an ordinary worker, which is not instrumented.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Final

from emufuzz.case.codec import decode_case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.finding import FAILED, Finding
from emufuzz.fuzz.libfuzzer.corpus import seed_corpus
from emufuzz.fuzz.libfuzzer.process import Death, FuzzerProcess
from emufuzz.fuzz.libfuzzer.target import fitted, scope_of
from emufuzz.fuzz.loop import PHASE_ORACLE, PHASES, CampaignLoop
from emufuzz.fuzz.tasks import BatchTask, Done, Failure, Setup, ShrinkTask, Task, WorkerState
from emufuzz.fuzz.triage import ProcessJudge
from emufuzz.fuzz.workers.local import LocalPool, WorkerUnavailableError
from emufuzz.oracle.compare import Difference

#: Processes that end in a row before they have executed anything, after which there is no point in more.
_STILLBORN: Final = 5
#: Seconds to wait for news while a process could take a task.
_SHORT: Final = 0.02
_SEED_BITS: Final = 31

#: Makes the process with a seed.
MakeProcess = Callable[[int], FuzzerProcess]


class _Seat:
    """A process, its task, and the account of it so far."""

    def __init__(self, process: FuzzerProcess) -> None:
        self.process = process
        self.task: BatchTask | None = None
        self.result = BatchResult(0)
        self.cut = False

    def give(self, task: BatchTask) -> None:
        self.task, self.result, self.cut = task, BatchResult(task.number), False
        self.process.run(task)

    @property
    def done(self) -> BatchTask:
        """The task, which ends where it was cut."""
        if self.task is None:
            raise ValueError("there is no task")
        return replace(self.task, stop=self.task.first + self.result.cases)

    def rest(self) -> BatchTask | None:
        """What is left of the task."""
        task = self.task
        if task is None:
            return None
        known = task.known | {finding.bucket for finding in self.result.findings}
        return replace(task, first=task.first + self.result.cases, known=known)


class FuzzerPool:
    """So many processes that run libFuzzer, and a worker that shrinks what they find.

    Args:
        setup: What the campaign works with.
        size: How many processes.
        directory: Their corpus; it is given generated cases if it has none.
        make: Makes a process; for tests.
    """

    def __init__(self, setup: Setup, size: int, directory: Path, make: MakeProcess | None = None) -> None:
        self._setup = setup
        self._size = size
        self._directory = directory
        self._make: MakeProcess = make or (lambda seed: FuzzerProcess(setup, directory, seed))
        self._seats: list[_Seat] = []
        self._helper: LocalPool | None = None
        self._judge = ProcessJudge(setup)
        self._batches: deque[BatchTask] = deque()
        self._shrinks: deque[ShrinkTask] = deque()
        self._made = 0
        self._stillborn = 0
        self.restarts = 0
        #: Seconds from the start after which tasks in work end early; None for no limit.
        self.seconds: float | None = None
        self._started = time.monotonic()

    @property
    def size(self) -> int:
        """How many processes run libFuzzer."""
        return self._size

    @property
    def instrumented(self) -> dict[str, int]:
        """Functions that are instrumented, per package; empty while no process is ready."""
        return next((seat.process.instrumented for seat in self._seats if seat.process.ready), {})

    def start(self) -> None:
        """Start the processes.

        Raises:
            OSError: The corpus cannot be written.
        """
        seed_corpus(self._directory, self._setup)
        self._started = time.monotonic()
        self._seats = [_Seat(self._new()) for _ in range(self._size)]

    def _new(self) -> FuzzerProcess:
        self._made += 1
        seed = (self._setup.seed * 1000 + self._made) % ((1 << _SEED_BITS) - 1)
        return self._make(seed + 1)

    # -- tasks -------------------------------------------------------------------------------------

    def idle(self) -> list[int]:
        """Numbers, which mean nothing but how many more tasks there can be."""
        free = len(self._free()) - len(self._batches) + (not self._shrinks)
        return list(range(max(0, free)))

    def _free(self) -> list[_Seat]:
        return [seat for seat in self._seats if seat.process.ready and seat.task is None]

    def submit(self, worker: int, task: Task) -> None:  # noqa: ARG002 - the kind of task decides
        """Take a task; it waits until whoever does its kind is free."""
        if isinstance(task, ShrinkTask):
            self._shrinks.append(task)
        else:
            self._batches.append(task)
        self._hand_out()

    def _hand_out(self) -> None:
        for seat in self._free():
            if self._batches:
                seat.give(self._batches.popleft())
        if not self._shrinks:
            return
        if self._helper is None:
            self._helper = LocalPool(self._setup, 1)
            self._helper.start()
        if self._helper.idle():
            self._helper.submit(0, self._shrinks.popleft())

    def poll(self, timeout: float) -> list[Done | Failure]:
        """What the workers have to say, after at most `timeout` seconds.

        Raises:
            WorkerUnavailableError: Processes cannot start here.
        """
        self._hand_out()
        self._end_in_time()
        short = bool(self._free()) and not self._batches
        wait([seat.process.connection for seat in self._seats], min(timeout, _SHORT) if short else timeout)
        said: list[Done | Failure] = []
        for place, seat in enumerate(self._seats):
            self._hear(place, seat, said)
        if self._helper is not None:
            said += self._helper.poll(0)
        return said

    def _end_in_time(self) -> None:
        """When time is up, have tasks in work end with what they have done."""
        if self.seconds is None or time.monotonic() - self._started < self.seconds:
            return
        for seat in self._seats:
            if seat.task is not None and not seat.cut:
                seat.cut = True
                seat.process.cut()

    def _hear(self, place: int, seat: _Seat, said: list[Done | Failure]) -> None:
        """Deal with everything that one process says."""
        while (news := seat.process.hear(busy=seat.task is not None)) is not None:
            if isinstance(news, Death):
                self._replace(place, seat, news, said)
                return
            kind, value = news
            if kind == "unavailable":
                raise WorkerUnavailableError(str(value))
            if kind == "error":
                raise RuntimeError(f"the process that runs libFuzzer failed:\n{value}")
            if kind != "ready":
                self._add(seat, value)
            if kind == "done" and seat.task is not None:
                said.append(Done(seat.done, seat.result))
                seat.task = None

    def _add(self, seat: _Seat, part: BatchResult) -> None:
        seat.result.cases += part.cases
        CampaignLoop.merge(seat.result, part)
        self._stillborn = 0

    def _replace(self, place: int, seat: _Seat, death: Death, said: list[Done | Failure]) -> None:
        """Put a new process in the place of one that has ended, with what is left of its task."""
        task, result = seat.task, seat.result
        incident = self._incident(seat, death)
        if incident is not None:
            result.add_incident(incident)
            self._stillborn = 0
        else:
            self._stillborn += 1
        if self._stillborn >= _STILLBORN:
            words = seat.process.last_words()
            raise WorkerUnavailableError(f"libFuzzer ended {_STILLBORN} times: {death.detail}: {words}")
        rest = seat.rest()
        seat.process.kill()
        self.restarts += 1
        new = self._seats[place] = _Seat(self._new())
        if task is None or rest is None:
            return
        if rest.first >= rest.stop:
            said.append(Done(task, result))
            return
        new.task, new.result = task, result
        new.process.run(rest)

    def _incident(self, seat: _Seat, death: Death) -> Finding | None:
        """The finding that a process's end is, if its case ends another process, too."""
        if death.case is None or seat.task is None:
            return None
        case = fitted(decode_case(death.case), scope_of(self._setup))
        how = self._judge.judge(case).failed
        if not how:
            return None
        kind = "hang" if death.reason == "hang" else "crash"
        who = PHASES[death.phase]
        shown = ("", death.detail) if death.phase == PHASE_ORACLE else (death.detail, "")
        sentence = f"the {who} did not survive the case: {death.detail}; again: {how.splitlines()[-1]}"
        index = seat.task.first + seat.result.cases
        difference = Difference(who, kind, *shown)
        return Finding("", kind, FAILED, seat.task.number, index, case, (difference,), sentence=sentence)

    # -- state -------------------------------------------------------------------------------------

    def states(self) -> list[WorkerState]:
        """What each process does, and the worker that shrinks if there is one."""
        helper: list[Any] = [] if self._helper is None else self._helper.states()
        return [seat.process.state(seat.task) for seat in self._seats] + helper

    def kill(self) -> None:
        """End all of them at once."""
        for seat in self._seats:
            seat.process.kill()
        self._seats = []
        self._judge.close()
        if self._helper is not None:
            self._helper.kill()

    def close(self) -> None:
        """Let idle ones end; kill those that do not."""
        for seat in self._seats:
            seat.process.close()
        self._seats = []
        self._judge.close()
        if self._helper is not None:
            self._helper.close()
