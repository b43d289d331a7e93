"""Which batch comes next: numbered tasks out, results merged in the order of their numbers.

Nothing here depends on which worker does what, or when: a campaign's result is that of its batches
merged in order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.finding import Bucket, Finding
from emufuzz.fuzz.loop import PHASE_GENERATE
from emufuzz.fuzz.tasks import BatchTask, Failure

#: Cases per batch.
BATCH_SIZE: Final = 2048
#: Batches per worker that may wait for an earlier one to be merged.
_AHEAD: Final = 8
#: Workers that may end before the first case of a batch.
_ATTEMPTS: Final = 10


class ScheduleError(Exception):
    """A batch that cannot be run at all; `reason` is that of its last failure."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class Merged:
    """A result that is next in order, with the places that it covers."""

    __slots__ = ("cases", "first", "incidents", "result")

    def __init__(self, task: BatchTask, result: BatchResult, incidents: list[Finding]) -> None:
        self.first = task.first
        self.cases = task.stop - task.first
        self.result = result
        self.incidents = incidents


class Schedule:
    """The batches of a campaign, from some place on up to a number of cases."""

    def __init__(
        self,
        start: tuple[int, int] = (0, 0),
        cases: int | None = None,
        workers: int = 1,
        window: Callable[[int], int] | None = None,
    ) -> None:
        """Begin.

        Args:
            start: Batch, and place in it, of the first case.
            cases: How many cases the whole campaign has; None without a limit.
            workers: How many batches are in work at a time.
            window: From how many batches are merged, the first one that must not begin yet.
        """
        number, first = start
        if first >= BATCH_SIZE:
            number, first = number + 1, 0
        self._next = self._merge_next = number
        self._first = first
        self._cases = cases
        self._ahead = _AHEAD * workers
        self._window = window
        self._repeat: list[BatchTask] = []
        self._results: dict[int, tuple[BatchTask, BatchResult]] = {}
        self._incidents: dict[int, list[Finding]] = {}
        self._fruitless: Counter[int] = Counter()

    @property
    def waiting(self) -> bool:
        """Whether a batch has to be repeated."""
        return bool(self._repeat)

    def more(self) -> bool:
        """Whether there are batches that were never handed out."""
        return self._cases is None or self._next * BATCH_SIZE + self._first < self._cases

    def take(self, known: frozenset[Bucket], *, new: bool) -> BatchTask | None:
        """The next task, a repeated one first; None if there is none now.

        Args:
            known: Buckets that the campaign has findings of.
            new: Whether a batch that was never handed out may be started.
        """
        if self._repeat:
            return self._repeat.pop(0)
        if not new or not self.more() or self._next - self._merge_next >= self._ahead:
            return None
        if self._window is not None and self._next >= self._window(self._merge_next):
            return None
        number, first, stop = self._next, self._first, BATCH_SIZE
        if self._cases is not None:
            stop = min(stop, self._cases - number * BATCH_SIZE)
        self._next, self._first = number + 1, 0
        return BatchTask(number, first, stop, known=known)

    def done(self, task: BatchTask, result: BatchResult) -> None:
        """Keep a result until it is its turn."""
        self._results[task.number] = task, result

    def failed(self, failure: Failure, task: BatchTask) -> bool:
        """Repeat a failed batch case by case; True if the case in work has to be blamed.

        A case is blamed when two workers have ended on it: one may have been killed by somebody. Before
        the first case, while a batch is generated, there is none to blame.

        Raises:
            ScheduleError: The batch itself takes worker after worker with it.
        """
        if failure.phase == PHASE_GENERATE or failure.index in task.excluded:
            self._again(task, failure)
            return False
        if not task.careful:
            self._repeat.append(replace(task, careful=True))
            return False
        if task.suspect != failure.index:
            self._repeat.append(replace(task, suspect=failure.index))
            return False
        excluded = task.excluded | {failure.index}
        self._repeat.append(replace(task, excluded=excluded, suspect=None))
        return True

    def _again(self, task: BatchTask, failure: Failure) -> None:
        self._fruitless[task.number] += 1
        if self._fruitless[task.number] >= _ATTEMPTS:
            how = f"{failure.reason}: {failure.detail}"
            text = f"batch {task.number} ended {_ATTEMPTS} workers before its first case: {how}"
            raise ScheduleError(text, failure.reason)
        self._repeat.append(task)

    def again(self, task: BatchTask) -> None:
        """Repeat a batch that did not run, without any fault of its own."""
        self._repeat.append(task)

    def blame(self, number: int, finding: Finding) -> None:
        """Keep the finding that a case is which took its workers with it."""
        self._incidents.setdefault(number, []).append(finding)

    def merged(self) -> Merged | None:
        """The next result in order, if it is there."""
        if self._merge_next not in self._results:
            return None
        task, result = self._results.pop(self._merge_next)
        incidents = self._incidents.pop(self._merge_next, [])
        self._merge_next += 1
        return Merged(task, result, incidents)
