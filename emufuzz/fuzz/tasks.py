"""What a driver asks of workers, and what it hears from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.finding import Bucket, Finding
from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.guided.snapshot import Snapshot
from emufuzz.fuzz.shrink import Limits as ShrinkLimits
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.oracle.base import Oracle
from emufuzz.subject.base import Subject


@dataclass(frozen=True, slots=True)
class Setup:
    """What a worker needs to know at its start.

    `make_subject` and `make_oracle` are importable; `others` are names of further oracles. `guided` batches
    work with a corpus.
    """

    seed: int
    options: Options
    make_subject: Callable[[], Subject]
    make_oracle: Callable[[], Oracle]
    bug: str = ""
    others: tuple[str, ...] = ()
    guided: bool = False


@dataclass(frozen=True, slots=True)
class BatchTask:
    """Run the cases of a batch from place `first` up to `stop`.

    Attributes:
        number: The batch.
        first, stop: Places in it; the cases of a place do not depend on where a task stops.
        careful: One by one, so that it is known which case was in work.
        excluded: Places to leave out: each has been found to take its worker with it.
        suspect: The place at which a careful run failed before.
        known: Buckets whose findings the driver has.
        corpus: The snapshot that a guided batch works with, for a worker that asked for it.
    """

    number: int
    first: int
    stop: int
    careful: bool = False
    excluded: frozenset[int] = frozenset()
    suspect: int | None = None
    known: frozenset[Bucket] = field(default=frozenset(), repr=False)
    corpus: Snapshot | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class ShrinkTask:
    """Shrink a finding; `attempt` counts the workers that it took with it."""

    finding: Finding
    limits: ShrinkLimits
    attempt: int = 0


Task = BatchTask | ShrinkTask


@dataclass(frozen=True, slots=True)
class CorpusWanted:
    """A worker does not have the snapshot of an epoch: the task has to come again, with it."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Done:
    """A task and what came of it."""

    task: Task
    value: BatchResult | Shrunk | CorpusWanted


@dataclass(frozen=True, slots=True)
class Failure:
    """A task that did not finish.

    `reason` is `hang`, `crash`, `memory`, `lost` (its machine went away) or `error` (an exception in the
    loop itself); `phase` and `index` are the last progress mark, `detail` an exit code or a traceback.
    """

    task: Task
    reason: str
    phase: int
    index: int
    detail: str


@dataclass(frozen=True, slots=True)
class WorkerState:
    """What a worker does now.

    Attributes:
        name: Where it is: a process id, or a machine and one.
        doing: `starting`, `idle`, `batch` or `shrink`.
        batch, index, phase: What is in work; -1 where nothing is.
        rss: Resident memory in bytes; 0 if unknown.
    """

    name: str
    doing: str
    batch: int = -1
    index: int = -1
    phase: int = -1
    rss: int = 0


class Pool(Protocol):
    """Workers that take one task each at a time; dead ones are replaced."""

    restarts: int

    @property
    def size(self) -> int:
        """How many workers there should be."""

    def start(self) -> None:
        """Start the workers; WorkerUnavailableError if there cannot be any."""

    def idle(self) -> list[int]:
        """Numbers of the workers that can take a task."""

    def submit(self, worker: int, task: Task) -> None:
        """Give an idle worker a task."""

    def poll(self, timeout: float) -> list[Done | Failure]:
        """What the workers have to say, after at most `timeout` seconds."""

    def states(self) -> list[WorkerState]:
        """What each worker does."""

    def kill(self) -> None:
        """End all workers at once."""

    def close(self) -> None:
        """Let idle workers end; kill those that do not."""


#: Called with (phase, place in the batch of the first case in work).
Progress = Callable[[int, int], None]
Message = tuple[str, Any]
