"""Workers on a Ray cluster: an actor each, which keeps a worker process on its machine."""

from __future__ import annotations

import time
from typing import Any, Final

import ray
from ray.exceptions import RayError

from emufuzz.fuzz.tasks import BatchTask, Done, Failure, Setup, Task, WorkerState
from emufuzz.fuzz.workers.local import MEMORY_LIMIT, WATCHDOG_SECONDS, WorkerUnavailableError
from emufuzz.fuzz.workers.ray_cluster import Cluster
from emufuzz.fuzz.workers.ray_host import READY, UNAVAILABLE, RayHost
from emufuzz.fuzz.workers.versions import difference, running_here

#: Workers per place that may go away in a row, without any result, before a campaign gives up.
_ATTEMPTS: Final = 5
#: Seconds that idle workers have to end.
_PATIENCE: Final = 5.0
#: An actor takes one processor; the second thread tells its state while the first is at work.
_OPTIONS: Final[dict[str, Any]] = {
    "num_cpus": 1,
    "max_concurrency": 2,
    "max_restarts": 0,
    "max_task_retries": 0,
}


def _actor(setup: Setup, watchdog: float, memory: int) -> Any:
    """A RayHost on some machine of the cluster."""
    remote: Any = ray.remote(RayHost)
    return remote.options(**_OPTIONS).remote(setup, watchdog, memory)


class Seat:
    """The driver's end of one worker."""

    def __init__(self, setup: Setup, watchdog: float, memory: int) -> None:
        self.actor = _actor(setup, watchdog, memory)
        self.ready = False
        self.dead = False
        self.task: Task | None = None
        #: The answer that is awaited: that of the start, or that to the task.
        self.pending = self.actor.start.remote()
        self._asked: Any = None
        self._told = WorkerState("", "starting")

    def submit(self, task: Task) -> None:
        """Give the worker a task."""
        self.task = task
        self.pending = self.actor.run.remote(task)

    def state(self) -> WorkerState:
        """What the worker did when it last said so; asks again, and waits for nothing."""
        if self.ready and self._asked is None:
            self._asked = self.actor.state.remote()
        elif self._asked is not None and ray.wait([self._asked], timeout=0)[0]:
            asked, self._asked = self._asked, None
            try:
                self._told = ray.get(asked)
            except RayError:
                self.dead = True
        return self._now()

    def _now(self) -> WorkerState:
        """The last answer, unless it is about something else than what is in work now."""
        told, task = self._told, self.task
        if task is None:
            return WorkerState(told.name, "idle" if self.ready else "starting", rss=told.rss)
        if not isinstance(task, BatchTask):
            return WorkerState(told.name, "shrink", index=told.index, rss=told.rss)
        if told.batch == task.number:
            return told
        return WorkerState(told.name, "batch", task.number, rss=told.rss)

    def kill(self) -> None:
        """End the actor, and its process with it."""
        self.dead = True
        ray.kill(self.actor)


class RayPool:
    """So many workers on a cluster."""

    def __init__(
        self,
        setup: Setup,
        cluster: Cluster,
        size: int,
        watchdog: float = WATCHDOG_SECONDS,
        memory: int = MEMORY_LIMIT,
    ) -> None:
        self._setup = setup
        self._cluster = cluster
        self._size = size
        self._watchdog = watchdog
        self._memory = memory
        self._here: dict[str, str] = {}
        self._seats: list[Seat] = []
        self._in_vain = 0
        self.restarts = 0

    @property
    def size(self) -> int:
        """How many workers there should be."""
        return self._size

    def start(self) -> None:
        """Start the workers."""
        self._here = running_here(self._setup)
        self._seats = [self._new() for _ in range(self._size)]

    def _new(self) -> Seat:
        return Seat(self._setup, self._watchdog, self._memory)

    def idle(self) -> list[int]:
        """Numbers of the workers that can take a task."""
        return [i for i, seat in enumerate(self._seats) if seat.ready and seat.task is None]

    def submit(self, worker: int, task: Task) -> None:
        """Give an idle worker a task."""
        self._seats[worker].submit(task)

    def poll(self, timeout: float) -> list[Done | Failure]:
        """What the workers have to say, after at most `timeout` seconds.

        Raises:
            WorkerUnavailableError: Workers cannot start on a machine, or one has other versions than this.
        """
        said = []
        for place in self._heard(timeout):
            event = self._hear(self._seats[place])
            if event is not None:
                said.append(event)
        for place, seat in enumerate(self._seats):
            if seat.dead and seat.task is None:
                seat.kill()
                self._seats[place] = self._new()
                self.restarts += 1
        return said

    def _heard(self, timeout: float) -> list[int]:
        """Places of the workers that have an answer."""
        awaited = {seat.pending: i for i, seat in enumerate(self._seats) if seat.pending is not None}
        if not awaited:
            time.sleep(timeout)
            return []
        refs = list(awaited)
        ray.wait(refs, timeout=timeout)
        there, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
        return sorted(awaited[ref] for ref in there)

    def _hear(self, seat: Seat) -> Done | Failure | None:
        """Take an answer; a worker that cannot go on is `dead` after it."""
        answer, seat.pending = seat.pending, None
        task, seat.task = seat.task, None
        try:
            value = ray.get(answer)
        except RayError as error:
            return self._lost(seat, task, _last(str(error)))
        if task is None:
            self._started(seat, *value)
            return None
        done: Done | Failure = value
        if isinstance(done, Done):
            self._in_vain = 0
        elif done.reason != "error":
            seat.dead = True
        return done

    def _started(self, seat: Seat, what: str, value: Any) -> None:
        if what == UNAVAILABLE:
            raise WorkerUnavailableError(value)
        if what != READY:
            self._lost(seat, None, value)
            return
        differs = difference(value, self._here)
        if differs:
            raise WorkerUnavailableError(f"ray: a machine of the cluster cannot take part: {differs}")
        seat.ready = True

    def _lost(self, seat: Seat, task: Task | None, detail: str) -> Failure | None:
        """A worker went away with its machine, or never came; the failure of its task."""
        seat.dead = True
        self._in_vain += 1
        if self._in_vain >= _ATTEMPTS * self._size:
            raise WorkerUnavailableError(
                f"ray: {self._in_vain} workers in a row went away; the last: {detail}"
            )
        return None if task is None else Failure(task, "lost", 0, 0, detail)

    def states(self) -> list[WorkerState]:
        """What each worker does."""
        return [seat.state() for seat in self._seats]

    def kill(self) -> None:
        """End all workers at once, and the cluster if it is ours."""
        for seat in self._seats:
            seat.kill()
        self._seats = []
        self._cluster.close()

    def close(self) -> None:
        """Let idle workers end; kill those that do not."""
        ends = [seat.actor.close.remote() for seat in self._seats if seat.ready and not seat.dead]
        if ends:
            ray.wait(ends, num_returns=len(ends), timeout=_PATIENCE)
        self.kill()


def _last(text: str) -> str:
    """The last line of a message that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "no reason given"
