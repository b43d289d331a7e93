"""An external program that runs cases: JSON lines over pipes (docs/command.md).

The program writes a hello line when it starts, then one answer per case, in order. It is started
again after it died or kept a case for too long; the case that did it is known by its place, and all
others are answered.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from emufuzz.arch.modes import MODES
from emufuzz.case.document import decode_object
from emufuzz.case.errors import CaseError, UnsupportedCaseError
from emufuzz.case.fields import MAX_DOCUMENT
from emufuzz.case.json import case_to_json, outcome_from_obj
from emufuzz.case.model import Case, Outcome, is_physical

PROTOCOL: Final = 1
HELLO_SECONDS: Final = 10.0
CASE_SECONDS: Final = 10.0

#: Cases that are under way at once.
_WINDOW: Final = 64
_READ: Final = 1 << 16
_HELLO_FIELDS: Final = frozenset({"emufuzz", "name", "version", "modes", "phys", "devices", "paths", "count"})


class ProgramError(Exception):
    """The program cannot be started, or does not speak the protocol; the message is one line."""


@dataclass(frozen=True, slots=True)
class Hello:
    """What a program says of itself: its name, its version, and what it can take."""

    name: str
    version: str = ""
    modes: frozenset[str] = frozenset(MODES)
    physical: bool = False
    devices: bool = False
    paths: frozenset[str] = frozenset()
    count: bool = False


@dataclass(slots=True)
class _Pending:
    """Lines that are on their way to the program, and what came back."""

    lines: list[bytes]
    answers: list[bytes] = field(default_factory=list)
    sent: int = 0
    out: bytes = b""
    buffer: bytes = b""


class Program:
    """A running program.

    Args:
        command: A command line, split as a shell would, but run without one.
        timeout: Seconds that one case may take.

    Raises:
        ProgramError: It does not start or does not say hello.
    """

    def __init__(self, command: str, timeout: float = CASE_SECONDS) -> None:
        self.command = command
        self.timeout = timeout
        self.restarts = 0
        self._process: subprocess.Popen[bytes] | None = None
        self._rest = b""
        self.hello = self._start()

    # -- the process ---------------------------------------------------------------------------

    def _start(self) -> Hello:
        try:
            argv = shlex.split(self.command)
            if not argv:
                raise ProgramError("the command is empty")
            self._process = subprocess.Popen(  # noqa: S603 - what the user names is run
                argv,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                process_group=0,  # Ctrl-C is for us; what the program has started ends with it
            )
        except (OSError, ValueError) as error:
            raise ProgramError(f"{self.command!r} does not start: {error}") from error
        self._rest = b""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                os.set_blocking(stream.fileno(), False)
        try:
            return self._read_hello()
        except ProgramError:
            self.close()
            raise

    def _read_hello(self) -> Hello:
        pending = _Pending([])
        deadline = time.monotonic() + HELLO_SECONDS
        while b"\n" not in pending.buffer:
            if time.monotonic() > deadline:
                raise ProgramError(f"{self.command!r} did not say hello within {HELLO_SECONDS:g} seconds")
            data = self._wait(pending, deadline, write=False)
            if data == b"":
                raise ProgramError(f"{self.command!r} {self._end()} before it said hello")
            if len(pending.buffer) > MAX_DOCUMENT:
                raise ProgramError(f"{self.command!r}: the hello line is too long")
        line, self._rest = pending.buffer.split(b"\n", 1)
        return read_hello(line, self.command)

    def _end(self) -> str:
        """How the process ended, for messages; it is waited for."""
        process = self._process
        if process is None:
            return "is not running"
        try:
            code = process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its output"
        if code < 0:
            return f"was ended by {signal.Signals(-code).name}"
        return f"exited with code {code}"

    def close(self) -> None:
        """End the program: at the end of its input it should stop; after a second it is killed."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            _kill(process)
        if process.stdout is not None:
            process.stdout.close()

    def _stop(self) -> None:
        """End a program that cannot go on; the next case starts it again."""
        process, self._process = self._process, None
        if process is not None:
            _kill(process)
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        self.restarts += 1

    # -- cases ---------------------------------------------------------------------------------

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError for a case that the program has not offered to take."""
        hello, extra = self.hello, case.extra or {}
        if case.mode not in hello.modes:
            raise UnsupportedCaseError(f"mode: {hello.name} has no {case.mode}")
        if case.path is not None and case.path not in hello.paths:
            raise UnsupportedCaseError(f"path: {hello.name} has no {case.path}")
        if case.count != 1 and not hello.count:
            raise UnsupportedCaseError(f"count: {hello.name} runs one instruction")
        if is_physical(case) and not hello.physical:
            raise UnsupportedCaseError(f"phys: {hello.name} has flat memory only")
        if "devices" in extra and not hello.devices:
            raise UnsupportedCaseError(f"devices: {hello.name} has none")

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """One outcome per case, in order; a case that the program did not survive has `crash` or `hang`."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(batch):
            if self._process is None:
                try:
                    self.hello = self._start()
                except ProgramError as error:
                    rest = batch[len(outcomes) :]
                    return outcomes + [_failed(case, f"does not start again: {error}") for case in rest]
            todo = batch[len(outcomes) : len(outcomes) + _WINDOW]
            answers, failure = self._exchange([case_to_json(case) + b"\n" for case in todo])
            accepted, in_step = self._accept(todo, answers)
            outcomes += accepted
            if failure and in_step:
                outcomes.append(_failed(todo[len(answers)], failure))
            if failure or not in_step:
                self._stop()
        return outcomes

    def _accept(self, todo: Sequence[Case], answers: Sequence[bytes]) -> tuple[list[Outcome], bool]:
        """The outcomes up to an answer that is not in its place, and whether there is none such."""
        found: list[Outcome] = []
        for case, answer in zip(todo, answers, strict=False):
            outcome = self._outcome(case, answer)
            if outcome.id != case.id:
                return [*found, _failed(case, f"answered {outcome.id!r} in place of {case.id!r}")], False
            found.append(outcome)
        if len(answers) > len(todo):
            return [*found[:-1], _failed(todo[-1], "wrote more answers than there were cases")], False
        return found, True

    def _exchange(self, lines: list[bytes]) -> tuple[list[bytes], str]:
        """Answers in order, and why there are fewer of them than lines: `hang`, or how the program ended."""
        pending = _Pending(lines, buffer=self._rest)
        self._take(pending)
        deadline = time.monotonic() + self.timeout
        while len(pending.answers) < len(lines):
            had = len(pending.answers)
            data = self._wait(pending, deadline, write=True)
            if data == b"":
                return pending.answers, self._end()
            self._take(pending)
            if len(pending.buffer) > MAX_DOCUMENT:
                return pending.answers, "wrote a line that is too long"
            if len(pending.answers) > had:
                deadline = time.monotonic() + self.timeout
            elif time.monotonic() > deadline:
                return pending.answers, "hang"
        self._rest = pending.buffer
        return pending.answers, ""

    @staticmethod
    def _take(pending: _Pending) -> None:
        """Move complete lines from the buffer to the answers."""
        *complete, pending.buffer = pending.buffer.split(b"\n")
        pending.answers += complete

    def _wait(self, pending: _Pending, deadline: float, *, write: bool) -> bytes | None:
        """Send and receive what is possible: what was read, b"" at the end of output, None for nothing."""
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            return b""
        if not pending.out and pending.sent < len(pending.lines):
            pending.out = pending.lines[pending.sent]
            pending.sent += 1
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            if write and pending.out:
                selector.register(process.stdin, selectors.EVENT_WRITE)
            ready = selector.select(max(deadline - time.monotonic(), 0))
        data: bytes | None = None
        for key, _ in ready:
            if key.fileobj is process.stdout:
                data = os.read(process.stdout.fileno(), _READ)
                pending.buffer += data
            elif not _send(process.stdin.fileno(), pending):
                return b""
        return data

    def _outcome(self, case: Case, line: bytes) -> Outcome:
        """The outcome in an answer; one that is no outcome is a crash of the program."""
        try:
            value = decode_object(line)
            if "unsupported" in value:
                return refused(case, str(value["unsupported"]), str(value.get("id", case.id)))
            return outcome_from_obj(value, case)
        except CaseError as error:
            return _failed(case, f"answered what is no outcome: {error}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program that has not been waited for yet, and what it has started."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _send(descriptor: int, pending: _Pending) -> bool:
    """Write as much as the pipe takes; False if nobody reads it any more."""
    try:
        written = os.write(descriptor, pending.out)
    except BlockingIOError:
        return True
    except BrokenPipeError:
        return False
    pending.out = pending.out[written:]
    return True


def _failed(case: Case, how: str) -> Outcome:
    outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system)
    if how == "hang":
        outcome.hang = True
    else:
        outcome.crash = f"the program {how}"
    return outcome


def refused(case: Case, reason: str, name: str | None = None) -> Outcome:
    """The outcome of a case that the program does not take; `name` is another id than the case's."""
    outcome = _failed(case, "")
    outcome.id = case.id if name is None else name
    outcome.crash, outcome.rc, outcome.decode_rc = "", "unhandleable", "failed"
    outcome.reason = f"unsupported: {reason}"
    outcome.unchecked = (("all", "command-unsupported"),)
    return outcome


def read_hello(line: bytes, command: str) -> Hello:
    """The hello of a program; ProgramError names the field that is wrong."""
    try:
        value = decode_object(line)
    except CaseError as error:
        raise ProgramError(f"{command!r}: hello: {error}") from error
    if value.get("emufuzz") != PROTOCOL:
        raise ProgramError(f'{command!r}: hello: expected an object with "emufuzz": {PROTOCOL}')
    unknown = value.keys() - _HELLO_FIELDS
    if unknown:
        raise ProgramError(f"{command!r}: hello.{min(unknown)}: unknown field")
    return Hello(
        name=_text(value, "name", command),
        version=_text(value, "version", command, default=""),
        modes=_names(value, "modes", command, MODES),
        physical=_flag(value, "phys", command),
        devices=_flag(value, "devices", command),
        paths=_names(value, "paths", command, ()),
        count=_flag(value, "count", command),
    )


def _text(value: dict[str, Any], name: str, command: str, default: str | None = None) -> str:
    text = value.get(name, default)
    if not isinstance(text, str) or not text.isprintable():
        raise ProgramError(f"{command!r}: hello.{name}: expected a printable string")
    return text


def _names(value: dict[str, Any], name: str, command: str, default: Sequence[str]) -> frozenset[str]:
    names = value.get(name, list(default))
    if not isinstance(names, list) or not all(isinstance(item, str) for item in names):
        raise ProgramError(f"{command!r}: hello.{name}: expected an array of strings")
    return frozenset(names)


def _flag(value: dict[str, Any], name: str, command: str) -> bool:
    flag = value.get(name, False)
    if not isinstance(flag, bool):
        raise ProgramError(f"{command!r}: hello.{name}: expected true or false")
    return flag
