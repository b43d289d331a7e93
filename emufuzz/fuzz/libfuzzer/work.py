"""What the child does with each input that libFuzzer makes. Loads the emulator."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Final, Self

from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.libfuzzer.mark import CUT, Mark
from emufuzz.fuzz.libfuzzer.mutators import Mutators, RawMutate
from emufuzz.fuzz.libfuzzer.target import Target, scope_of
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.tasks import BatchTask, Setup
from emufuzz.fuzz.workers.body import die_with_driver
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.registry import open_oracle

#: Seconds between two reports of a task that is in work.
_REPORT: Final = 0.5


class Work:
    """Executes inputs as tasks allow: so many cases each. Between tasks libFuzzer waits in an execution."""

    def __init__(self, connection: Connection, mark: Mark, setup: Setup, loop: CampaignLoop) -> None:
        self._connection = connection
        self._mark = mark
        self._scope = scope_of(setup)
        self._target = Target(loop, self._scope)
        self._next = self._stop = 0
        self._reported = 0.0
        #: What is in effect for as long as this process lives.
        self.until_the_end = ExitStack()

    @classmethod
    def start(cls, connection: Connection, mark: Mark, setup: Setup, driver: int) -> Self | None:
        """Open subject and oracles; None, and the driver knows why, if one cannot work here."""
        die_with_driver(driver)
        try:
            others = [open_oracle(name) for name in setup.others]
            loop = CampaignLoop(setup.make_subject(), setup.make_oracle(), mark.progress, others)
        except OracleUnavailableError as error:
            connection.send(("unavailable", str(error)))
            return None
        work = cls(connection, mark, setup, loop)
        work.until_the_end.enter_context(seeded_bug(setup.bug))
        return work

    def mutators(self, raw: RawMutate) -> Mutators:
        """The mutators that fit the campaign."""
        return Mutators(self._scope, raw)

    def execute(self, data: bytes) -> None:
        """Run the case that an input stands for, when the driver allows one more."""
        if self._next == self._stop:
            self._await_task()
        target, mark = self._target, self._mark
        mark.case(data or b"\0")
        mark.progress(0, self._next)
        target.run(target.decoded(data), self._next)
        mark.idle()
        self._next += 1
        if self._next == self._stop:
            self._connection.send(("done", target.result))
        elif time.monotonic() - self._reported >= _REPORT:
            self._report()

    def _report(self) -> None:
        """Send the account so far, and begin a new one."""
        result = self._target.result
        if self._connection.poll() and self._connection.recv() == CUT:
            self._stop = self._next
            self._connection.send(("done", result))
            return
        self._connection.send(("part", result))
        self._target.begin(result.number)
        self._target.loop.known |= {finding.bucket for finding in result.findings}
        self._reported = time.monotonic()

    def _await_task(self) -> None:
        while (task := self._connection.recv()) == CUT:
            pass  # it came too late for the last task
        if not isinstance(task, BatchTask):
            os._exit(0)
        self._next, self._stop = task.first, task.stop
        self._target.begin(task.number)
        self._target.loop.known = task.known
        self._reported = time.monotonic()
