"""Workers that are no processes: they do what workers do, in an order of the test's choice."""

from __future__ import annotations

from random import Random

from emufuzz.fuzz.engines import make_oracle
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.shrink import shrink
from emufuzz.fuzz.tasks import BatchTask, Done
from emufuzz.fuzz.workers.body import Held, run_batch


class SerialPool:
    """A pool of `size` workers of which a random one with a task answers at a time."""

    restarts = 0

    def __init__(self, setup, size, seed=0):
        self.size = size
        self._setup = setup
        self._rng = Random(seed)
        self._loop = CampaignLoop(setup.make_subject(), make_oracle())
        self._held = [Held() for _ in range(size)]
        self._tasks = {}
        self.batches = []
        self.asked = 0

    def start(self):
        """Nothing to do."""

    def idle(self):
        return [i for i in range(self.size) if i not in self._tasks]

    def submit(self, worker, task):
        self._tasks[worker] = task

    def poll(self, timeout):
        if not self._tasks:
            return []
        worker = self._rng.choice(sorted(self._tasks))
        task = self._tasks.pop(worker)
        if not isinstance(task, BatchTask):
            return [Done(task, shrink(task.finding, self._loop.finding_of, task.limits))]
        value = run_batch(self._loop, task, self._setup, self._held[worker])
        if hasattr(value, "epoch"):
            self.asked += 1
        else:
            self.batches.append(task.number)
        return [Done(task, value)]

    def states(self):
        return []

    def kill(self):
        self._tasks = {}

    def close(self):
        self._tasks = {}
