"""Worker processes: they run numbered batches; the driver watches them and replaces dead ones.

A worker marks in shared memory which case it works on. One that makes no progress is killed, one
that dies is noticed; the same batch is then run again case by case, which names the culprit, and
once more without it.
"""

from __future__ import annotations

import multiprocessing as mp
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Final

from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.loop import BatchResult, CampaignLoop
from emufuzz.oracle.base import Oracle, OracleUnavailableError
from emufuzz.subject.base import Subject

#: Seconds without progress after which a worker counts as hanging.
WATCHDOG_SECONDS: Final = 20.0


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to know at its start. `make_subject` and `make_oracle` are importable."""

    seed: int
    options: Options
    make_subject: Callable[[], Subject]
    make_oracle: Callable[[], Oracle]
    bug: str = ""


@dataclass(frozen=True, slots=True)
class Task:
    """Run the first `size` cases of a batch; one by one if `careful`, without `excluded` ones."""

    number: int
    size: int
    careful: bool = False
    excluded: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Failure:
    """A batch that did not finish.

    `reason` is `hang`, `crash` or `error` (an exception in the loop itself); `phase` and `index` are
    the last progress mark, `detail` an exit code or a traceback.
    """

    task: Task
    reason: str
    phase: int
    index: int
    detail: str


class WorkerUnavailableError(OracleUnavailableError):
    """A worker could not start because its subject or oracle cannot work here."""


def worker_main(connection: Connection, mark: Any, setup: Setup) -> None:
    """Body of a worker process: tasks in, results out, until the driver hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair

    def progress(phase: int, index: int) -> None:
        mark[0] = phase
        mark[1] = index
        mark[2] += 1

    try:
        loop = CampaignLoop(setup.make_subject(), setup.make_oracle(), progress)
    except OracleUnavailableError as error:
        connection.send(("unavailable", str(error)))
        return
    with seeded_bug(setup.bug):
        connection.send(("ready", None))
        _serve(connection, loop, setup)


def _serve(connection: Connection, loop: CampaignLoop, setup: Setup) -> None:
    while True:
        try:
            task = connection.recv()
        except (EOFError, OSError):
            return
        if task is None:
            return
        try:
            connection.send(("result", _run(loop, task, setup)))
        except Exception:  # noqa: BLE001 - the driver repeats the batch carefully and finds the case
            connection.send(("error", traceback.format_exc()))


def _run(loop: CampaignLoop, task: Task, setup: Setup) -> BatchResult:
    cases = generate_batch(setup.seed, task.number, task.size, setup.options)
    if task.careful:
        return loop.run_carefully(task.number, cases, task.excluded)
    return loop.run_batch(task.number, cases)


class Worker:
    """The driver's end of one worker process."""

    def __init__(self, setup: Setup, watchdog: float = WATCHDOG_SECONDS) -> None:
        context = mp.get_context("spawn")
        self._connection, child = context.Pipe()
        self._mark = context.RawArray("q", 3)
        self._watchdog = watchdog
        self._process = context.Process(
            target=worker_main, args=(child, self._mark, setup), daemon=True, name="emufuzz-worker"
        )
        self._process.start()
        child.close()
        self.ready = False
        self.task: Task | None = None
        self._seen = (-1, time.monotonic())

    @property
    def waitable(self) -> Connection:
        """What `multiprocessing.connection.wait` can wait for."""
        return self._connection

    def submit(self, task: Task) -> None:
        """Give the worker a batch; it must be idle."""
        self.task = task
        self._mark[0] = self._mark[1] = 0
        self._seen = (self._mark[2], time.monotonic())
        try:
            self._connection.send(task)
        except (BrokenPipeError, OSError):
            return  # its death is noticed by `receive`

    def receive(self) -> BatchResult | Failure | None:
        """What the worker has to say now: a result, a failure, or None.

        Raises:
            WorkerUnavailableError: Its subject or oracle cannot work here.
        """
        try:
            if not self._connection.poll():
                return None
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            return self._failure("crash", self._death())
        if kind == "unavailable":
            raise WorkerUnavailableError(value)
        if kind == "ready":
            self.ready = True
            return None
        if kind == "error":
            return self._failure("error", value)
        self.task = None
        return value  # type: ignore[no-any-return] # what _serve sends as a result

    def _death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def _failure(self, reason: str, detail: str) -> Failure:
        task, self.task = self.task, None
        if task is None:
            raise WorkerUnavailableError(f"a worker ended before its first batch: {detail}")
        return Failure(task, reason, self._mark[0], self._mark[1], detail)

    def check_hang(self) -> Failure | None:
        """Kill the worker if it has made no progress for too long."""
        if self.task is None:
            return None
        count, since = self._seen
        if self._mark[2] != count:
            self._seen = (self._mark[2], time.monotonic())
            return None
        if time.monotonic() - since < self._watchdog:
            return None
        failure = self._failure("hang", f"no progress for {self._watchdog:g} s")
        self.kill()
        return failure

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._process.join()
        self._connection.close()

    def close(self) -> None:
        """Ask the process to end; kill it if it does not."""
        try:
            self._connection.send(None)
        except (BrokenPipeError, OSError):
            self.kill()
            return
        self._process.join(5)
        self.kill()


def wait_for_any(workers: list[Worker], timeout: float) -> None:
    """Sleep until a worker has something to say, or for `timeout` seconds."""
    wait([worker.waitable for worker in workers], timeout)
