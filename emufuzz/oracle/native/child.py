"""The disposable process in which cases run, as its parent sees it."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import select
import signal
import struct
import time
from collections.abc import Sequence
from typing import Final

from emufuzz.case.model import PAGE_SHIFT, Segment
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.native.handler import DONE_FD, WAKE_FD
from emufuzz.oracle.native.image import ARENA_FD, Call, Layout, failed_call, program
from emufuzz.oracle.native.layout import CONTROL_COUNT, CONTROL_CURRENT, MAX_PAGES

#: Seconds without progress after which a child counts as hung.
PATIENCE: Final = 5.0
_POLL_MS: Final = 100
_REPORT: Final = struct.Struct("<Qq")
_WORD: Final = struct.Struct("<Q")
#: Descriptors from here on are not those that the child gets.
_LOWEST_FD: Final = 10
# Where the runtime may lie: far above the cases that fit below 4 GiB, far below stack and vDSO.
_LOWEST_BASE: Final = 1 << 40
_BASES: Final = 1 << 21
_BASE_STEP: Final = 1 << 25
_AWAY_BITS: Final = 38  # cases' pages in the same or a neighbouring 256 GiB are too near


class DeadChildError(Exception):
    """The child ended or was ended.

    Attributes:
        hang: It made no progress.
        known: The current record is what ended it.
    """

    def __init__(self, reason: str, *, hang: bool = False, known: bool = True) -> None:
        super().__init__(reason)
        self.hang = hang
        self.known = known


class Child:
    """A process that can run cases with a set of pages and an LDT, and nothing else.

    Attributes:
        layout: Its address space.
        arena: Offsets in `memory`.
        memory: The memory shared with it.
        index: Page number -> place among the pages.
    """

    def __init__(self, pages: Sequence[int], ldt: tuple[Segment | None, ...]) -> None:
        """Start it.

        Raises:
            OracleUnavailableError: the kernel refuses something that it needs.
        """
        if len(pages) > MAX_PAGES:
            raise ValueError(f"{len(pages)} pages")
        self.layout = Layout(_free_base(pages), tuple(sorted(pages)), ldt)
        self.arena = self.layout.arena
        self.index = {page: place for place, page in enumerate(self.layout.pages)}
        self._pid = 0
        self._wake = self._done = -1
        self._poll = select.poll()
        self._runs = 0
        arena_fd = _anonymous_file("emufuzz-arena")
        try:
            self.memory = _mapped(arena_fd, self.arena.size)
            self._start(arena_fd)
        finally:
            os.close(arena_fd)

    def _start(self, arena_fd: int) -> None:
        image, calls = program(self.layout)
        program_fd = _anonymous_file("emufuzz-native")
        wake, self._wake = _pipe()
        self._done, done = _pipe()
        try:
            os.write(program_fd, image)
            self._pid = _spawn(program_fd, ((wake, WAKE_FD), (done, DONE_FD), (arena_fd, ARENA_FD)))
            self._poll.register(self._done, select.POLLIN)
        except OSError as error:
            self.close()
            raise OracleUnavailableError(f"native: starting its process: {error.strerror}") from error
        finally:
            for fd in (wake, done, program_fd):
                os.close(fd)
        problem = self._problem(calls)
        if problem:
            self.close()
            raise OracleUnavailableError(f"native: {problem}")

    def _problem(self, calls: Sequence[Call]) -> str:
        """Why the child has not come as far as to wait for cases, else nothing."""
        if not self._poll.poll(PATIENCE * 1000):
            return "the process does not start"
        report = os.read(self._done, _REPORT.size)
        if len(report) == _REPORT.size:
            return failed_call(calls, *_REPORT.unpack(report))
        return "" if report else f"the process ends before its first case: {self._end()}"

    @property
    def pid(self) -> int:
        """Process id; 0 once it is closed."""
        return self._pid

    @property
    def current(self) -> int:
        """Number of the record that is running, or ended the child."""
        return int(_WORD.unpack_from(self.memory, self.arena.control + CONTROL_CURRENT)[0])

    def run(self, count: int, patience: float = PATIENCE) -> None:
        """Run the first `count` records.

        Raises:
            DeadChildError: it did not finish them; `current` says at which it ended.
        """
        _WORD.pack_into(self.memory, self.arena.control + CONTROL_CURRENT, 0)
        _WORD.pack_into(self.memory, self.arena.control + CONTROL_COUNT, count)
        self._runs += 1
        token = bytes((self._runs & 0xFF,))
        with contextlib.suppress(BrokenPipeError):  # it is dead already, as the read below will tell
            os.write(self._wake, token)
        self._wait(patience)
        answer = os.read(self._done, _REPORT.size)
        if not answer:
            raise DeadChildError(self._end())
        if answer != token or self.current != count:
            self._end()
            raise DeadChildError("it wrote to its parent by itself", known=False)

    def _wait(self, patience: float) -> None:
        """Until the child has something to say, or is dead, or has not moved on for `patience` seconds."""
        current, since = -1, time.monotonic()
        while not self._poll.poll(min(_POLL_MS, patience * 1000)):
            now = time.monotonic()
            if self.current != current:
                current, since = self.current, now
            elif now - since >= patience:
                self._end()
                raise DeadChildError(f"no progress for {patience} s", hang=True)

    def _end(self) -> str:
        """End the process; how it ended."""
        if not self._pid:
            return ""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)
        _, status = os.waitpid(self._pid, 0)
        self._pid = 0
        if os.WIFSIGNALED(status):
            return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
        return f"exited with {os.waitstatus_to_exitcode(status)}"

    def close(self) -> None:
        """End the process and release its memory; more than once is no error."""
        if self.memory.closed:
            return
        self._end()
        for fd in (self._wake, self._done):
            os.close(fd)
        self.memory.close()


def _free_base(pages: Sequence[int]) -> int:
    """A random address for the runtime, away from the cases' pages: no case can aim at it."""
    taken = {page << PAGE_SHIFT >> _AWAY_BITS for page in pages}
    while True:
        base = _LOWEST_BASE + random.SystemRandom().randrange(_BASES) * _BASE_STEP
        if taken.isdisjoint({(base >> _AWAY_BITS) - 1, base >> _AWAY_BITS, (base >> _AWAY_BITS) + 1}):
            return base


def _mapped(descriptor: int, size: int) -> mmap.mmap:
    """An anonymous file of `size` bytes, mapped. Limits on files and memory hold for it, too."""
    try:
        os.ftruncate(descriptor, size)
        return mmap.mmap(descriptor, size)
    except OSError as error:
        raise OracleUnavailableError(f"native: {size:,} bytes of memory: {error.strerror}") from error


def _anonymous_file(name: str) -> int:
    try:
        fd = os.memfd_create(name)
    except OSError as error:
        raise OracleUnavailableError(f"native: memfd_create: {error.strerror}") from error
    return _out_of_the_way(fd)


def _pipe() -> tuple[int, int]:
    read, write = os.pipe()
    return _out_of_the_way(read), _out_of_the_way(write)


def _out_of_the_way(fd: int) -> int:
    """A descriptor that is none of the child's, for the same file."""
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _LOWEST_FD)
    os.close(fd)
    return moved


def _spawn(program_fd: int, descriptors: Sequence[tuple[int, int]]) -> int:
    """Execute the program with these descriptors, (ours, the child's), and no others."""
    return os.posix_spawn(
        f"/proc/self/fd/{program_fd}",
        ["emufuzz-native"],
        {},
        file_actions=[(os.POSIX_SPAWN_DUP2, ours, theirs) for ours, theirs in descriptors],
        setpgroup=0,
        setsigmask=(),
        setsigdef=[signal.SIGPIPE],
    )
