"""Workers as processes of this machine.

A worker marks in shared memory which case it works on. One that makes no progress is killed, so is one
that takes too much memory, and one that dies is noticed; each is replaced.
"""

from __future__ import annotations

import multiprocessing as mp
import os
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Final

from emufuzz.fuzz.tasks import BatchTask, Done, Failure, Setup, Task, WorkerState
from emufuzz.fuzz.workers.body import worker_main
from emufuzz.fuzz.workers.clock import ProcessClock
from emufuzz.oracle.base import OracleUnavailableError

#: Seconds without progress after which a worker counts as hanging, as ProcessClock counts them.
WATCHDOG_SECONDS: Final = 20.0
#: Bytes of resident memory above which a worker is replaced.
MEMORY_LIMIT: Final = 4 << 30
#: Workers that die while they start, in a row, after which there is no point in starting more.
_START_ATTEMPTS: Final = 5
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


class WorkerUnavailableError(OracleUnavailableError):
    """A worker could not start because its subject or oracle cannot work here."""


def resident(pid: int) -> int:
    """Resident memory of a process in bytes, of this one for 0; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid or 'self'}/statm").read_text(encoding="ascii").split()[1]) * _PAGE
    except (OSError, IndexError):
        return 0


class Worker:
    """The driver's end of one worker process."""

    def __init__(self, setup: Setup, watchdog: float = WATCHDOG_SECONDS, memory: int = MEMORY_LIMIT) -> None:
        context = mp.get_context("spawn")
        self._connection, child = context.Pipe()
        self._mark = context.RawArray("q", 3)
        self._watchdog = watchdog
        self._memory = memory
        self._process = context.Process(
            target=worker_main,
            args=(child, self._mark, setup, os.getpid()),
            daemon=True,
            name="emufuzz-worker",
        )
        self._process.start()
        child.close()
        self.ready = False
        self.dead = False
        self.task: Task | None = None
        #: What it runs, once it is ready.
        self.versions: dict[str, str] = {}
        self._seen = -1
        self._clock = ProcessClock(self.pid)

    @property
    def waitable(self) -> Connection:
        """What `multiprocessing.connection.wait` can wait for."""
        return self._connection

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid or 0

    @property
    def state(self) -> WorkerState:
        """What it does now."""
        return self.state_as(str(self.pid))

    def state_as(self, name: str) -> WorkerState:
        """What it does now, under a name; another thread may be in the other methods."""
        rss, task = self.rss(), self.task
        if task is None:
            return WorkerState(name, "idle" if self.ready else "starting", rss=rss)
        if isinstance(task, BatchTask):
            return WorkerState(name, "batch", task.number, self._mark[1], self._mark[0], rss)
        return WorkerState(name, "shrink", index=self._mark[1], rss=rss)

    def rss(self) -> int:
        """Resident memory in bytes; 0 if the process is gone."""
        return resident(self.pid) if self.pid else 0

    def submit(self, task: Task) -> None:
        """Give the worker a task; it must be idle."""
        self.task = task
        self._mark[0] = self._mark[1] = 0
        self._seen = self._mark[2]
        self._clock.restart()
        try:
            self._connection.send(task)
        except (BrokenPipeError, OSError):
            return  # its death is noticed by `receive`

    def receive(self) -> Done | Failure | None:
        """What the worker has to say now; it is `dead` after a failure that ended it.

        Raises:
            WorkerUnavailableError: Its subject or oracle cannot work here.
        """
        try:
            if not self._connection.poll():
                return self._overdue()
            kind, value = self._connection.recv()
        except (EOFError, OSError):
            return self._failure("crash", self._death())
        if kind == "unavailable":
            raise WorkerUnavailableError(value)
        if kind == "ready":
            self.ready, self.versions = True, value
            return None
        task, self.task = self.task, None
        if task is None:
            raise RuntimeError(f"a worker without a task says {kind}")
        if kind == "error":
            return Failure(task, "error", self._mark[0], self._mark[1], value)
        return Done(task, value)

    def _death(self) -> str:
        self._process.join(5)
        code = self._process.exitcode
        return f"killed by signal {-code}" if code is not None and code < 0 else f"exit code {code}"

    def _failure(self, reason: str, detail: str) -> Failure | None:
        """The failure of the task in work; None if there is none."""
        task, self.task = self.task, None
        phase, index = self._mark[0], self._mark[1]
        self.kill()
        return None if task is None else Failure(task, reason, phase, index, detail)

    def _overdue(self) -> Failure | None:
        """Kill the worker if it has made no progress for too long, or takes too much memory."""
        if self.task is None:
            return None
        if self.rss() > self._memory:
            return self._failure("memory", f"more than {self._memory >> 20} MiB of memory")
        if self._mark[2] != self._seen:
            self._seen = self._mark[2]
            self._clock.restart()
            return None
        if self._clock.seconds() < self._watchdog:
            return None
        return self._failure("hang", f"no progress for {self._watchdog:g} s")

    def kill(self) -> None:
        """End the process at once."""
        self.dead = True
        self._process.kill()
        self._process.join()
        self._connection.close()

    def close(self) -> None:
        """Ask the process to end; kill it if it does not."""
        if self.dead:
            return
        try:
            self._connection.send(None)
            self._process.join(5)
        except (BrokenPipeError, OSError):
            self.kill()
            return
        self.kill()


class LocalPool:
    """So many worker processes."""

    def __init__(
        self, setup: Setup, size: int, watchdog: float = WATCHDOG_SECONDS, memory: int = MEMORY_LIMIT
    ) -> None:
        self._setup = setup
        self._size = size
        self._watchdog = watchdog
        self._memory = memory
        self._workers: list[Worker] = []
        self._stillborn = 0
        self.restarts = 0

    @property
    def size(self) -> int:
        """How many workers there should be."""
        return self._size

    def start(self) -> None:
        """Start the workers."""
        self._workers = [self._new() for _ in range(self._size)]

    def _new(self) -> Worker:
        return Worker(self._setup, self._watchdog, self._memory)

    def idle(self) -> list[int]:
        """Numbers of the workers that can take a task."""
        return [i for i, worker in enumerate(self._workers) if worker.ready and worker.task is None]

    def submit(self, worker: int, task: Task) -> None:
        """Give an idle worker a task."""
        self._workers[worker].submit(task)

    def poll(self, timeout: float) -> list[Done | Failure]:
        """What the workers have to say, after at most `timeout` seconds.

        Raises:
            WorkerUnavailableError: Workers cannot start here.
        """
        wait([worker.waitable for worker in self._workers], timeout)
        said = []
        for i, worker in enumerate(self._workers):
            event = worker.receive()
            if event is not None:
                said.append(event)
            if worker.dead:
                self._replace(i, worker)
        return said

    def _replace(self, place: int, dead: Worker) -> None:
        self._stillborn = 0 if dead.ready else self._stillborn + 1
        if self._stillborn >= _START_ATTEMPTS:
            raise WorkerUnavailableError(f"{self._stillborn} workers in a row ended before their first batch")
        self._workers[place] = self._new()
        self.restarts += 1

    def states(self) -> list[WorkerState]:
        """What each worker does."""
        return [worker.state for worker in self._workers]

    def kill(self) -> None:
        """End all workers at once."""
        for worker in self._workers:
            worker.kill()

    def close(self) -> None:
        """Let idle workers end; kill those that do not."""
        for worker in self._workers:
            worker.close()
