"""Recorded vectors: a file of lines `{"case":..,"expect":..}`, plain or compressed with zstd.

A file whose name ends in .moo or .moo.gz is read as one of the SingleStepTests (emufuzz.case.moo).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import zstandard

from emufuzz.case.document import decode_object
from emufuzz.case.errors import CaseError
from emufuzz.case.fields import MAX_DOCUMENT
from emufuzz.case.json import case_from_obj
from emufuzz.case.model import Case
from emufuzz.case.moo import is_moo
from emufuzz.case.moo_vectors import moo_vectors

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_CHUNK: Final = 8192  # compressed bytes at a time


def read_vectors(path: str | Path) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The (case, expect) pairs of a file, one by one; blank lines are skipped.

    `expect` is what the case becomes, as in docs/case-format.md (Delta); emufuzz.case.delta reads it.

    Raises:
        CaseError: the file cannot be read, or a line of it is not a vector; the message names
            the file, the line (from 1), the field and the reason.
    """
    if is_moo(path):
        yield from moo_vectors(path)
        return
    yield from _read_lines(path, vector_from_json)


def read_cases(path: str | Path) -> Iterator[tuple[Case, dict[str, Any] | None]]:
    """The cases of a file of JSON lines, one by one, with `expect` where a line is a vector.

    Raises:
        CaseError: as from `read_vectors`.
    """
    return _read_lines(path, _case_or_vector)


_T = TypeVar("_T")


def _read_lines(path: str | Path, read: Callable[[bytes], _T]) -> Iterator[_T]:
    """What `read` makes of each line that is not blank; errors name the file and the line."""
    number = 0
    try:
        for line in _lines(Path(path)):
            number += 1
            if line and not line.isspace():
                yield read(line)
    except CaseError as error:
        raise CaseError(f"{path}:{number}: {error}") from None
    except zstandard.ZstdError as error:
        raise CaseError(f"{path}: not readable as zstd: {error}") from None
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror or error}") from None


def _case_or_vector(line: bytes) -> tuple[Case, dict[str, Any] | None]:
    value = decode_object(line)
    return vector_of(value) if type(value.get("case")) is dict else (case_from_obj(value), None)


def vector_from_json(line: bytes | str) -> tuple[Case, dict[str, Any]]:
    """The case and the recorded `expect` of one vector line.

    Raises:
        CaseError: the line is not a vector.
    """
    return vector_of(decode_object(line))


def vector_of(vector: dict[str, Any]) -> tuple[Case, dict[str, Any]]:
    """The case and the `expect` of a decoded vector line.

    Raises:
        CaseError: it is not a vector.
    """
    for name in ("case", "expect"):
        if type(vector.get(name)) is not dict:
            raise CaseError(f"{name}: missing or not an object")
    unknown = vector.keys() - {"case", "expect"}
    if unknown:
        raise CaseError(f"{min(unknown)}: unknown field")
    return case_from_obj(vector["case"]), vector["expect"]


def _lines(path: Path) -> Iterator[bytes]:
    """The file's lines; it tells by its first bytes whether it is compressed."""
    with path.open("rb") as raw:
        if raw.peek(4)[:4] == _ZSTD_MAGIC:
            yield from _split(_decompressed(raw))
            return
        while line := raw.readline(MAX_DOCUMENT + 2):
            yield line


def _decompressed(raw: BinaryIO) -> Iterator[bytes]:
    """Pieces of the contents of all zstd frames in the file."""
    frame = None
    while chunk := raw.read(_CHUNK):
        while chunk:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            yield frame.decompress(chunk)
            chunk = b""
            if frame.eof:
                chunk, frame = frame.unused_data, None
    if frame is not None:
        raise CaseError("the compressed data ends too early")


def _split(pieces: Iterable[bytes]) -> Iterator[bytes]:
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        yield from lines
        if len(rest) > MAX_DOCUMENT:
            break
    if rest:
        yield rest
