"""What runs on a machine of a Ray cluster: one worker process of its own, watched from beside it.

The watchdog, the memory limit and the notice of a death are those of workers/local.py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import ModuleType
from typing import Final

from emufuzz.fuzz.tasks import Done, Failure, Setup, Task, WorkerState
from emufuzz.fuzz.workers.local import Worker, WorkerUnavailableError
from emufuzz.fuzz.workers.versions import sources

#: Seconds between two looks at the worker when it says nothing.
_TICK: Final = 0.25

READY: Final = "ready"
UNAVAILABLE: Final = "unavailable"
STILLBORN: Final = "stillborn"


class RayHost:
    """One worker process; a Ray actor is made of this class.

    Two threads of the actor are in here at most: one that runs a task, and one that asks for the state.
    The process is started by the constructor: the kernel ends it when the thread that made it ends, and
    that of the constructor lives as long as the actor.
    """

    def __init__(self, setup: Setup, watchdog: float, memory: int) -> None:
        self._where = f"{socket.gethostname()}:{os.getpid()}"
        with _without_main():
            self._worker = Worker(setup, watchdog, memory)

    def start(self) -> tuple[str, dict[str, str] | str]:
        """Wait until the worker can take a task; gives what it runs, or why there is none."""
        worker = self._worker
        try:
            while not (worker.ready or worker.dead):
                wait([worker.waitable], _TICK)
                worker.receive()
        except WorkerUnavailableError as error:
            return UNAVAILABLE, f"{self._where}: {error}"
        if worker.dead:
            return STILLBORN, f"{self._where}: a worker ended before its first batch"
        return READY, worker.versions | sources()

    def run(self, task: Task) -> Done | Failure:
        """Run a task to its end, or to that of the worker, which is of no use then."""
        worker = self._worker
        worker.submit(task)
        while True:
            wait([worker.waitable], _TICK)
            said = worker.receive()
            if said is not None:
                return said

    def state(self) -> WorkerState:
        """What the worker does now."""
        return self._worker.state_as(f"{self._where.partition(':')[0]}:{self._worker.pid}")

    def close(self) -> None:
        """Let the worker end."""
        self._worker.close()


@contextmanager
def _without_main() -> Iterator[None]:
    """A process that is spawned imports the main module again: Ray's, with all of Ray, has no use there."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
