"""Files that users name: one JSON document, or one per line, read with bounded memory."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple

import msgspec

from emufuzz.case.fields import MAX_DOCUMENT
from emufuzz.cli.errors import InputError
from emufuzz.cli.lines import LineReader

STDIN: Final = "-"
CAMPAIGN_FILE: Final = "campaign.sqlite"
CAMPAIGN_FINDINGS: Final = "findings"
_SUFFIXES: Final = (".json", ".jsonl")
_TOO_LONG: Final = f"longer than {MAX_DOCUMENT >> 20} MiB"


class Document(NamedTuple):
    """A JSON object and where it came from: `FILE`, or `FILE:LINE` if the file has several."""

    where: str
    value: dict[str, Any]


def files_of(path: Path) -> Iterator[Path]:
    """The files that a path stands for: itself; of a campaign its findings; else all .json and .jsonl below.

    Only one directory's names are in memory at a time. Links to directories are not followed.

    Raises:
        OSError: A directory cannot be read.
        InputError: It has no such file.
    """
    if str(path) == STDIN or not path.is_dir():
        yield path
        return
    top = path / CAMPAIGN_FINDINGS if (path / CAMPAIGN_FILE).is_file() else path
    empty = True
    for found in _below(top):
        empty = False
        yield found
    if empty and top is path:
        raise InputError(str(path), "a directory without .json and .jsonl files")


def _below(top: Path) -> Iterator[Path]:
    """Files of cases below a directory, in the order of their names."""
    names, directories = [], set()
    with os.scandir(top) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                directories.add(entry.name)
            elif not entry.name.endswith(_SUFFIXES):
                continue
            names.append(entry.name)
    names.sort()
    for name in names:
        if name in directories:
            yield from _below(top / name)
        else:
            yield top / name


def read_documents(path: Path) -> Iterator[Document]:
    """The documents of a file: one object over any number of lines, or one object per line.

    Raises:
        InputError: A document is not a JSON object, is too long, or there is none.
        OSError: The file cannot be read.
    """
    if str(path) == STDIN:
        yield from _documents("stdin", sys.stdin.buffer)
        return
    with path.open("rb") as stream:
        yield from _documents(str(path), stream)


def _documents(name: str, stream: BinaryIO) -> Iterator[Document]:
    head = stream.read(MAX_DOCUMENT + 1)
    if not head.strip():
        raise InputError(name, "empty, expected a case, a vector line or a finding")
    lines = head.split(b"\n")
    if len(head) <= MAX_DOCUMENT and not _several(lines):
        yield Document(name, _object(name, head))
        return
    yield from _per_line(name, _Rejoined(head, stream))


def _several(lines: list[bytes]) -> bool:
    """Whether a file is one object per line: its first line that is not blank is a whole document."""
    filled = [line for line in lines if line.strip()]
    if len(filled) < 2:
        return False
    try:
        msgspec.json.decode(filled[0])
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return False
    return True


def _per_line(name: str, stream: Any) -> Iterator[Document]:
    for batch in LineReader(stream, MAX_DOCUMENT).batches():
        for line in batch:
            where = f"{name}:{line.number}"
            if line.data is None:
                raise InputError(where, _TOO_LONG)
            if line.data.strip():
                yield Document(where, _object(where, line.data))


def _object(where: str, data: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InputError(where, f"not JSON: {error}") from error
    except RecursionError as error:
        raise InputError(where, "not usable: nested too deeply") from error
    if not isinstance(value, dict):
        raise InputError(where, "expected a JSON object: a case, a vector line or a finding")
    return value


class _Rejoined:
    """A stream whose beginning was already read."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def read1(self, size: int, /) -> bytes:
        """What was read before, then the rest."""
        head, self._head = self._head, b""
        return head or self._rest.read(size)
