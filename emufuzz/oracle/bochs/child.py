"""The process in which Bochs runs, as its parent sees it."""

from __future__ import annotations

import os
import pickle
import select
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.bochs.server import LENGTH, write_message

#: Seconds that one case may take.
PATIENCE: Final = 10.0
#: Seconds until the process must be there.
_START: Final = 60.0
_CHUNK: Final = 1 << 16
_SERVER: Final = "emufuzz.oracle.bochs.server"


class DeadChildError(Exception):
    """The child ended or was ended; `hang` if a case took too long."""

    def __init__(self, reason: str, *, hang: bool) -> None:
        super().__init__(reason)
        self.hang = hang


class Child:
    """A process with one engine."""

    def __init__(self, patience: float = PATIENCE) -> None:
        """Start it.

        Args:
            patience: seconds that one case may take.

        Raises:
            OracleUnavailableError: it does not start, or Bochs cannot be loaded there.
        """
        self._patience = patience
        self._buffer = bytearray()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        try:
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter, with a module of ours
                [sys.executable, "-m", _SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
                process_group=0,  # Ctrl-C is for the parent, which may want to finish its batch
            )
        except OSError as error:
            raise OracleUnavailableError(f"bochs: starting its process: {error.strerror}") from error
        try:
            problem = self._receive(_START)
        except DeadChildError as error:
            problem = f"bochs: the process does not start: {error}"
        if problem:
            self.close()
            raise OracleUnavailableError(str(problem))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def run(self, batch: Sequence[Case]) -> Iterator[Outcome]:
        """The outcomes of a batch, in order.

        Raises:
            DeadChildError: the case behind the last outcome ended the child, or hung it.
        """
        if self._process.stdin is None:
            raise DeadChildError("it has no input", hang=False)
        try:
            write_message(self._process.stdin, list(batch))  # type: ignore[arg-type]  # IO[bytes] is one
        except BrokenPipeError:
            raise DeadChildError(self._end(), hang=False) from None
        for case in batch:
            outcome, changed = self._receive(self._patience)
            outcome.system = case.system if changed is None else changed
            yield outcome

    def _receive(self, patience: float) -> Any:
        """The next message."""
        size = LENGTH.unpack(self._take(LENGTH.size, patience))[0]
        return pickle.loads(self._take(size, patience))  # noqa: S301 - from our own child

    def _take(self, size: int, patience: float) -> bytes:
        """So many bytes of what the child says."""
        buffer, stream = self._buffer, self._process.stdout
        while len(buffer) < size:
            if stream is None or not select.select([stream], [], [], patience)[0]:
                self._end()
                raise DeadChildError(f"no answer for {patience} s", hang=True)
            data = os.read(stream.fileno(), _CHUNK)
            if not data:
                raise DeadChildError(self._end(), hang=False)
            buffer += data
        taken = bytes(buffer[:size])
        del buffer[:size]
        return taken

    def _end(self) -> str:
        """End the process; how it ended."""
        if self._process.poll() is None:
            self._wait_or_kill()
        status = self._process.returncode
        if status < 0:
            return f"killed by signal {-status}"
        return f"exited with {status}"

    def _wait_or_kill(self) -> None:
        """It has closed its pipe and will end by itself, or hangs."""
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def close(self) -> None:
        """End the process; more than once is no error."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
