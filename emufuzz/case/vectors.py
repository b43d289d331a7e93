"""Recorded vectors: a file of lines `{"case":..,"expect":..}`, plain or compressed with zstd."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final

import zstandard

from emufuzz.case.document import decode_object
from emufuzz.case.errors import CaseError
from emufuzz.case.fields import MAX_DOCUMENT
from emufuzz.case.json import case_from_obj
from emufuzz.case.model import Case

_ZSTD_MAGIC: Final = b"\x28\xb5\x2f\xfd"
_CHUNK: Final = 8192  # compressed bytes at a time


def read_vectors(path: str | Path) -> Iterator[tuple[Case, dict[str, Any]]]:
    """The (case, expect) pairs of a file, one by one; blank lines are skipped.

    `expect` is what the case becomes, as in docs/case-format.md (Delta); emufuzz.case.delta reads it.

    Raises:
        CaseError: the file cannot be read, or a line of it is not a vector; the message names
            the file, the line (from 1), the field and the reason.
    """
    number = 0
    try:
        for line in _lines(Path(path)):
            number += 1
            if line and not line.isspace():
                yield vector_from_json(line)
    except CaseError as error:
        raise CaseError(f"{path}:{number}: {error}") from None
    except zstandard.ZstdError as error:
        raise CaseError(f"{path}: not readable as zstd: {error}") from None
    except OSError as error:
        raise CaseError(f"{path}: {error.strerror or error}") from None


def vector_from_json(line: bytes | str) -> tuple[Case, dict[str, Any]]:
    """The case and the recorded `expect` of one vector line.

    Raises:
        CaseError: the line is not a vector.
    """
    vector = decode_object(line)
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
