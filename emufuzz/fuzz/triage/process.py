"""Judging in a process of its own, which a case may kill or hang without harm."""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Final

from emufuzz.case.model import Case
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.tasks import Setup
from emufuzz.fuzz.triage.judgement import Judgement, PanelJudge, failed
from emufuzz.fuzz.workers.body import die_with_driver
from emufuzz.fuzz.workers.clock import ProcessClock
from emufuzz.fuzz.workers.local import MEMORY_LIMIT, resident
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.registry import open_oracle

#: Seconds that a case may take, as ProcessClock counts them; it takes milliseconds.
CASE_SECONDS: Final = 20.0
#: Seconds that the start of engines and their self-tests may take.
START_SECONDS: Final = 120.0
#: Processes that may end while they start, in a row.
_ATTEMPTS: Final = 3
_TICK: Final = 0.25


class ProcessJudge:
    """A judge with the subject, oracles and seeded bug of a campaign; its process starts when needed."""

    def __init__(self, setup: Setup, seconds: float = CASE_SECONDS) -> None:
        self._setup = setup
        self._seconds = seconds
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def judge(self, case: Case) -> Judgement:
        """What is said of a case; a death or a hang is a failure.

        Raises:
            OracleUnavailableError: Subject or oracles cannot work here.
        """
        connection = self._connection or self._start()
        try:
            connection.send(case)
            if late := self._wait(connection, self._seconds):
                self._kill()
                return failed(late)
            answer = connection.recv()
        except (EOFError, OSError):
            return failed(f"the process ended: {self._kill()}")
        if not isinstance(answer, Judgement):
            raise TypeError(f"a judge's answer is a {type(answer).__name__}")
        return answer

    def _wait(self, connection: Connection, seconds: float) -> str:
        """Wait for an answer; why there is no point in that any longer, empty if there is one."""
        pid = 0 if self._process is None else self._process.pid or 0
        clock = ProcessClock(pid)
        while not connection.poll(_TICK):
            if clock.seconds() >= seconds:
                return f"no answer for {seconds:g} s"
            if pid and resident(pid) > MEMORY_LIMIT:
                return f"more than {MEMORY_LIMIT >> 20} MiB of memory"
        return ""

    def _start(self) -> Connection:
        """A process that is ready; somebody may kill one that is not, so a death says nothing yet."""
        for _ in range(_ATTEMPTS):
            connection = self._spawn()
            try:
                late = self._wait(connection, START_SECONDS)
                said = f"the judge does not start: {late}" if late else connection.recv()
            except (EOFError, OSError):
                self._kill()
                continue
            if said:
                self._kill()
                raise OracleUnavailableError(said)
            return connection
        raise OracleUnavailableError(f"the judge ended at its start, {_ATTEMPTS} times in a row")

    def _spawn(self) -> Connection:
        context = mp.get_context("spawn")
        connection, child = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(child, self._setup, os.getpid()), daemon=True, name="emufuzz-triage"
        )
        self._process.start()
        child.close()
        self._connection = connection
        return connection

    def _kill(self) -> str:
        """End the process; how it ended."""
        process, connection, self._process, self._connection = self._process, self._connection, None, None
        if connection is not None:
            connection.close()
        if process is None:
            return "it was gone"
        process.join(1)
        process.kill()
        process.join()
        code = process.exitcode or 0
        return f"signal {-code}" if code < 0 else f"exit code {code}"

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._kill()


def _serve(connection: Connection, setup: Setup, driver: int) -> None:
    """Body of the process: cases in, judgements out, until the driver hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's affair
    die_with_driver(driver)
    try:
        others = [open_oracle(name) for name in setup.others]
        judge = PanelJudge(setup.make_subject(), setup.make_oracle(), others)
    except OracleUnavailableError as error:
        connection.send(str(error))
        return
    with seeded_bug(setup.bug):
        connection.send("")
        while True:
            try:
                connection.send(judge.judge(connection.recv()))
            except (EOFError, OSError):
                return  # the driver is gone
