"""The driver's end of one process that runs libFuzzer."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any, Final, NamedTuple

from emufuzz.fuzz.libfuzzer.mark import CUT, Mark
from emufuzz.fuzz.tasks import BatchTask, Setup, WorkerState
from emufuzz.fuzz.workers.clock import ProcessClock
from emufuzz.fuzz.workers.local import MEMORY_LIMIT, WATCHDOG_SECONDS

_CHILD: Final = "emufuzz.fuzz.libfuzzer.child"
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")
_LOG_SHOWN: Final = 4096


class Death(NamedTuple):
    """How a process ended: a reason as `Failure` has it, words for it, and the case in work."""

    reason: str
    detail: str
    phase: int
    case: bytes | None


class FuzzerProcess:
    """A process that runs libFuzzer over a directory of encoded cases.

    Args:
        setup: What the campaign works with.
        directory: The corpus.
        seed: Of libFuzzer's generator, not 0.
        watchdog: Seconds that one case may take, as ProcessClock counts them.
        memory: Bytes of resident memory that it may take.
    """

    def __init__(
        self,
        setup: Setup,
        directory: Path,
        seed: int,
        watchdog: float = WATCHDOG_SECONDS,
        memory: int = MEMORY_LIMIT,
    ) -> None:
        self.connection, child = Pipe()
        self._mark = Mark.create()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - open for as long as the process is
        self._process = _started(child, self._mark, self._log)
        child.close()
        self._watchdog, self._memory = watchdog, memory
        self._clock = ProcessClock(self._process.pid)
        self._seen = -1
        self.ready = False
        #: Instrumented functions per package, once it is ready.
        self.instrumented: dict[str, int] = {}
        self._send((setup, str(directory), seed))

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def _send(self, value: Any) -> None:
        try:
            self.connection.send(value)
        except OSError:
            return  # its end is noticed by `hear`

    def run(self, task: BatchTask) -> None:
        """Let it execute the cases of a task."""
        self._clock.restart()
        self._send(task)

    def cut(self) -> None:
        """Let the task that it has end soon."""
        self._send(CUT)

    def hear(self, *, busy: bool) -> tuple[str, Any] | Death | None:
        """What it says now; a Death if it has ended, or was ended as it took too long or too much memory.

        Args:
            busy: Whether it has a task.
        """
        try:
            if not self.connection.poll():
                return self._overdue(busy=busy)
            kind, value = self.connection.recv()
        except (EOFError, OSError):
            return self._death("crash", self._ended())
        if kind == "ready":
            self.ready, self.instrumented = True, value
        return kind, value

    def _ended(self) -> str:
        try:
            code = self._process.wait(5)
        except subprocess.TimeoutExpired:
            return "it hung up"
        return f"killed by signal {-code}" if code < 0 else f"exit code {code}"

    def _overdue(self, *, busy: bool) -> Death | None:
        rss = self.rss()
        if rss > self._memory:
            return self._death("memory", f"more than {self._memory >> 20} MiB of memory")
        marks = self._mark.read()[2]
        if not busy or marks != self._seen or self._mark.read_case() is None:
            self._seen = marks
            self._clock.restart()
        elif self._clock.seconds() >= self._watchdog:
            return self._death("hang", f"no progress for {self._watchdog:g} s")
        return None

    def _death(self, reason: str, detail: str) -> Death:
        self._process.kill()
        self._process.wait()
        phase, _, _ = self._mark.read()
        return Death(reason, detail, phase, self._mark.read_case())

    def rss(self) -> int:
        """Resident memory in bytes; 0 if the process is gone."""
        try:
            text = Path(f"/proc/{self.pid}/statm").read_text(encoding="ascii")
            return int(text.split()[1]) * _PAGE
        except (OSError, IndexError):
            return 0

    def state(self, task: BatchTask | None) -> WorkerState:
        """What it does now."""
        if task is None:
            return WorkerState(str(self.pid), "idle" if self.ready else "starting", rss=self.rss())
        phase, index, _ = self._mark.read()
        return WorkerState(str(self.pid), "batch", task.number, index, phase, self.rss())

    def last_words(self) -> str:
        """The last line of what it wrote to its standard error."""
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - _LOG_SHOWN))
        lines = self._log.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it wrote nothing")

    def close(self) -> None:
        """Ask it to end; kill it if it does not."""
        self._send(None)
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.kill()

    def kill(self) -> None:
        """End it at once, and give up what it needed."""
        self._process.kill()
        self._process.wait()
        self.connection.close()
        self._mark.close()
        self._log.close()


def _started(child: Connection, mark: Mark, log: Any) -> subprocess.Popen[bytes]:
    """The process; nothing of the directory it is started in gets into its path."""
    descriptors = child.fileno(), mark.descriptor
    command = [sys.executable, "-P", "-m", _CHILD, *map(str, descriptors), str(os.getpid())]
    return subprocess.Popen(  # noqa: S603 - this Python, a module of ours
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, pass_fds=descriptors
    )
