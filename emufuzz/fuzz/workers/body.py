"""What runs in a worker: tasks in, results out, until the driver hangs up."""

from __future__ import annotations

import ctypes
import os
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any, Final

from emufuzz.case.model import Case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.collector import collect_rarely
from emufuzz.fuzz.guided.epochs import LAG, epoch_of
from emufuzz.fuzz.guided.feedback import candidates
from emufuzz.fuzz.guided.generate import GuidedGenerator
from emufuzz.fuzz.guided.snapshot import Snapshot, empty
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.shrink import Shrunk, shrink
from emufuzz.fuzz.tasks import BatchTask, CorpusWanted, Progress, Setup, ShrinkTask, Task
from emufuzz.fuzz.workers.versions import running
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.registry import open_oracle

_PR_SET_PDEATHSIG: Final = 1


def die_with_driver(driver: int) -> None:
    """Have the kernel end this process when the driver dies, even while a case hangs.

    Args:
        driver: The driver's process id; if it is gone already, this process ends now.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != driver:
        os._exit(1)


def worker_main(connection: Connection, mark: Any, setup: Setup, driver: int) -> None:
    """Body of a worker process.

    Args:
        connection: To the driver.
        mark: Shared memory of three numbers: phase, place in the batch, and a count of marks.
        setup: What to work with.
        driver: Process id of the driver.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair
    die_with_driver(driver)

    def progress(phase: int, index: int) -> None:
        mark[0] = phase
        mark[1] = index
        mark[2] += 1

    try:
        others = [open_oracle(name) for name in setup.others]
        loop = CampaignLoop(setup.make_subject(), setup.make_oracle(), progress, others)
    except OracleUnavailableError as error:
        connection.send(("unavailable", str(error)))
        return
    collect_rarely()
    with seeded_bug(setup.bug):
        connection.send(("ready", running(loop.subject, loop.oracle, others)))
        _serve(connection, loop, setup, progress)


def _serve(connection: Connection, loop: CampaignLoop, setup: Setup, progress: Progress) -> None:
    held = Held()
    while True:
        try:
            task = connection.recv()
            if task is None:
                return
            connection.send(_answer(loop, task, setup, progress, held))
        except (EOFError, OSError):
            return  # the driver is gone


def _answer(loop: CampaignLoop, task: Task, setup: Setup, progress: Progress, held: Held) -> tuple[str, Any]:
    try:
        if isinstance(task, ShrinkTask):
            return "result", _shrink(loop, task, progress)
        return "result", run_batch(loop, task, setup, held)
    except Exception:  # noqa: BLE001 - the driver repeats the batch carefully and finds the case
        return "error", traceback.format_exc()


def _shrink(loop: CampaignLoop, task: ShrinkTask, progress: Progress) -> Shrunk:
    """Shrink a finding; each case that is tried counts as progress."""
    tried = 0

    def find(case: Any) -> Any:
        nonlocal tried
        tried += 1
        progress(0, tried)
        return loop.finding_of(case)

    return shrink(task.finding, find, task.limits)


def run_batch(
    loop: CampaignLoop, task: BatchTask, setup: Setup, held: Held | None = None
) -> BatchResult | CorpusWanted:
    """Generate the cases of a task and run them; `held` are the snapshots of guided batches."""
    loop.known = task.known
    if not setup.guided:
        cases = generator_of(setup.seed, task.number, setup.options).cases(task.stop)
        return _run(loop, task, cases, task.first)
    snapshot = (Held() if held is None else held).snapshot(task)
    if snapshot is None:
        return CorpusWanted(epoch_of(task.number))
    cases = GuidedGenerator(setup.seed, task.number, setup.options, snapshot).cases(task.stop)
    result = _run(loop, task, cases, task.first)
    if task.stop == BATCH_SIZE:
        # What a batch feeds back must not depend on where an earlier run stopped in it.
        whole = _run(loop, task, cases, 0) if task.first else result
        result.candidates = candidates(loop.subject, cases, whole, snapshot.known, task.excluded)
    return result


def _run(loop: CampaignLoop, task: BatchTask, cases: list[Case], first: int) -> BatchResult:
    """Run the cases from place `first` on."""
    if task.careful:
        excluded = frozenset(place for place in task.excluded if place >= first)
        return loop.run_carefully(task.number, cases[first:], excluded, first)
    return loop.run_batch(task.number, cases[first:], first)


class Held:
    """The snapshots that a worker has: those of the last epochs that it heard of."""

    def __init__(self) -> None:
        self._snapshots: dict[int, Snapshot] = {}

    def snapshot(self, task: BatchTask) -> Snapshot | None:
        """That of the task's epoch, which the task may bring; None if it is not here."""
        epoch = epoch_of(task.number)
        if task.corpus is not None:
            self._snapshots = {e: old for e, old in self._snapshots.items() if abs(e - epoch) < LAG}
            self._snapshots.setdefault(epoch, task.corpus)
        return empty(epoch) if epoch < LAG else self._snapshots.get(epoch)
