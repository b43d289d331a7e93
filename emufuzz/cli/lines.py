"""Lines from a byte stream, as soon as they are there, with bounded memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

CHUNK: Final = 1 << 18


class RawStream(Protocol):
    """A binary stream whose `read1` waits for some input, not for all that was asked for."""

    def read1(self, size: int, /) -> bytes:
        """Up to `size` bytes, at least one unless the stream ended."""


class Line(NamedTuple):
    """One line without its end; `data` is None when it was longer than allowed and thrown away."""

    number: int
    data: bytes | None


class LineReader:
    """Splits a stream into lines; gives all that have arrived at once, so they can be run as a batch."""

    def __init__(self, stream: RawStream, max_length: int) -> None:
        self._stream = stream
        self._max = max_length
        self._pending: list[bytes] = []  # pieces of the line that has not ended yet
        self._size = 0  # their length, also of pieces that were dropped
        self._number = 0

    def batches(self) -> Iterator[list[Line]]:
        """Lists of lines that have arrived together; waits for input, never for the end of it."""
        while chunk := self._stream.read1(CHUNK):
            *complete, rest = chunk.split(b"\n")
            lines = [self._finish(piece) for piece in complete]
            self._keep(rest)
            if lines:
                yield lines
        if self._size:
            yield [self._finish(b"")]

    def _keep(self, piece: bytes) -> None:
        """Add to the unfinished line, or drop all of it once it is too long."""
        self._size += len(piece)
        if self._size > self._max:
            self._pending.clear()
        elif piece:
            self._pending.append(piece)

    def _finish(self, piece: bytes) -> Line:
        self._keep(piece)
        data = None if self._size > self._max else b"".join(self._pending)
        self._pending.clear()
        self._size = 0
        self._number += 1
        return Line(self._number, data)
