from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from emufuzz.cli.lines import CHUNK, Line, LineReader


def lines_of(data: bytes, max_length: int = 1000) -> list[Line]:
    return [line for batch in LineReader(io.BytesIO(data), max_length).batches() for line in batch]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", []),
        (b"a", [b"a"]),
        (b"a\n", [b"a"]),
        (b"a\nb\n", [b"a", b"b"]),
        (b"a\n\n\nb", [b"a", b"", b"", b"b"]),
        (b"\n", [b""]),
    ],
)
def test_splits_and_numbers_lines(data: bytes, expected: list[bytes]) -> None:
    assert lines_of(data) == [Line(i, line) for i, line in enumerate(expected, 1)]


def test_line_over_the_limit_is_dropped_and_the_next_one_kept() -> None:
    assert lines_of(b"x" * 11 + b"\nok\n", max_length=10) == [Line(1, None), Line(2, b"ok")]
    assert lines_of(b"x" * 10 + b"\n", max_length=10) == [Line(1, b"x" * 10)]


def test_long_line_without_end_is_reported_once() -> None:
    assert lines_of(b"x" * (3 * CHUNK), max_length=10) == [Line(1, None)]


def test_line_longer_than_a_chunk_arrives_whole() -> None:
    data = b"y" * (2 * CHUNK + 17)
    assert lines_of(data + b"\nz", max_length=len(data)) == [Line(1, data), Line(2, b"z")]


def test_a_line_is_given_before_the_next_arrives(tmp_path: Path) -> None:
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as stream, os.fdopen(write_end, "wb", buffering=0) as writer:
        batches = LineReader(stream, 100).batches()
        writer.write(b"first\nsec")
        assert next(batches) == [Line(1, b"first")]
        writer.write(b"ond\nthird\n")
        assert next(batches) == [Line(2, b"second"), Line(3, b"third")]
