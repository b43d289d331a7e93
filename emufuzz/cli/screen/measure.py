"""What is measured over the time of a campaign: throughput, growth, restarts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import Final

from emufuzz.fuzz.tasks import WorkerState

#: Seconds over which the present throughput is taken.
WINDOW: Final = 30.0
#: Seconds between two samples of it.
_EVERY: Final = 0.25
#: Points of a growth curve; with more of them every second one is left out.
_POINTS: Final = 512


class Rate:
    """Cases per second in the last WINDOW seconds."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque()

    def add(self, seconds: float, cases: int) -> None:
        """Note how many cases were done at a time."""
        samples = self._samples
        if samples and seconds - samples[-1][0] < _EVERY:
            return
        samples.append((seconds, cases))
        while seconds - samples[0][0] > WINDOW:
            samples.popleft()

    def per_second(self) -> float:
        """The throughput; 0 before there are two samples."""
        if len(self._samples) < 2:
            return 0.0
        (start, before), (end, after) = self._samples[0], self._samples[-1]
        return (after - before) / (end - start)


class Growth:
    """How something grows over all runs of a campaign.

    Attributes:
        value: The last value.
        at: Seconds, of all runs, at which it last grew; None if that is not known.
    """

    def __init__(self, past: Iterable[tuple[float, int]] = ()) -> None:
        """Begin with (seconds of all runs, value) as earlier runs recorded them."""
        self.value = 0
        self.at: float | None = None
        self._points: list[tuple[float, int]] = []
        self._step = 0.0
        for seconds, then in past:
            self.add(seconds, then)

    def add(self, seconds: float, value: int) -> None:
        """Note a value; times do not go back, but for seconds that a killed run did not record."""
        if value > self.value:
            self.value, self.at = value, seconds
        points = self._points
        if points and seconds - points[-1][0] < self._step:
            return
        points.append((seconds, value))
        if len(points) > _POINTS:
            del points[1::2]
            self._step = (points[-1][0] - points[0][0]) / len(points)

    def columns(self, width: int) -> list[int]:
        """The values at `width` equally distant times, from the first to the last."""
        if not self._points or width < 1:
            return []
        first, last = self._points[0][0], self._points[-1][0]
        values, place = [], 0
        for column in range(width):
            until = first + (last - first) * (column + 1) / width
            while place + 1 < len(self._points) and self._points[place + 1][0] <= until:
                place += 1
            values.append(max(self._points[place][1], self.value if column == width - 1 else 0))
        return values


class Restarts:
    """How often the worker of each place was replaced, as its name shows."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self.counts: list[int] = []

    def see(self, workers: Sequence[WorkerState]) -> None:
        """Note who works now."""
        for place, worker in enumerate(workers):
            if place == len(self._names):
                self._names.append(worker.name)
                self.counts.append(0)
            elif self._names[place] != worker.name:
                self._names[place] = worker.name
                self.counts[place] += 1
