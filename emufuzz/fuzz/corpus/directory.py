"""A corpus as files: a directory of JSON lines, one file per family of instructions or exit path.

A line is a case, or a recorded vector `{"case":..,"expect":..}`. Lines are added and never changed; each
file is replaced as a whole, so that a reader sees the old one or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from emufuzz.arch.leaves import family_of
from emufuzz.case.json import case_to_json, case_to_obj
from emufuzz.case.model import Case, Outcome
from emufuzz.case.vectors import read_cases
from emufuzz.fuzz.files import reason_of, write_atomically

LINES: Final = ".jsonl"
#: Where cases are whose bytes select no leaf: decoding failed before the tables were asked.
NO_LEAF: Final = "undefined"
#: What the names of files of exit paths begin with.
PATH_PREFIX: Final = "path-"
#: Cases of one corpus; more are an error, not a machine without memory.
MAX_CASES: Final = 1 << 20
#: Files of one corpus, of which there is one per family and exit path.
MAX_FILES: Final = 1 << 12
_INTO_ONE: Final = "`emufuzz corpus add CORPUS SOURCE` makes one of such a directory"

_to_json: Final = msgspec.json.Encoder().encode


class CorpusError(Exception):
    """A corpus cannot be read or written; the message is one line that names the file and the reason."""


class Entry(NamedTuple):
    """A case, and what it was recorded to become, if it is a vector."""

    case: Case
    expect: dict[str, Any] | None = None

    def line(self) -> bytes:
        """The entry as a line of JSON, without the newline."""
        if self.expect is None:
            return case_to_json(self.case)
        return _to_json({"case": case_to_obj(self.case), "expect": self.expect})


def digest(case: Case) -> str:
    """SHA-256 of a case without its id: the same for equal cases."""
    return hashlib.sha256(case_to_json(msgspec.structs.replace(case, id=""))).hexdigest()


def family_name(case: Case, outcome: Outcome) -> str:
    """The file that a case belongs to: its exit path's, or its family's."""
    if case.path is not None:
        return PATH_PREFIX + case.path
    return family_of(outcome.leaf) if outcome.leaf else NO_LEAF


def corpus_files(directory: Path) -> list[Path]:
    """The files of a corpus, in the order of their names.

    Raises:
        CorpusError: There is no such directory, it cannot be read, something in it is no file, or there
            are too many.
    """
    try:
        with os.scandir(directory) as entries:
            found = (entry.name for entry in entries if entry.name.endswith(LINES))
            names = sorted(islice(found, MAX_FILES + 1))
    except OSError as error:
        raise CorpusError(f"{directory}: {reason_of(error)}") from error
    if len(names) > MAX_FILES:
        raise CorpusError(f"{directory}: no corpus: more than {MAX_FILES:,} {LINES} files; {_INTO_ONE}")
    files = [directory / name for name in names if not name.startswith(".")]
    for file in files:
        if not file.is_file():
            raise CorpusError(f"{file}: not a file")
    return files


def read_file(file: Path) -> Iterator[Entry]:
    """The entries of one file.

    Raises:
        CaseError: A line is neither a case nor a vector, or the file cannot be read.
    """
    for case, expect in read_cases(file):
        yield Entry(case, expect)


def read_corpus(directory: Path) -> Iterator[tuple[str, Entry]]:
    """Every entry with the name of its file, without the suffix.

    Raises:
        CaseError, CorpusError: The corpus is not valid, or cannot be read.
    """
    count = 0
    for file in corpus_files(directory):
        for entry in read_file(file):
            count += 1
            if count > MAX_CASES:
                raise CorpusError(f"{directory}: more than {MAX_CASES} cases")
            yield file.stem, entry


class Addition(NamedTuple):
    """What became of entries that were to be added: how many were new, and how many were there already."""

    added: int
    known: int


class CorpusWriter:
    """A corpus directory that entries are added to; nothing is written before `write`."""

    def __init__(self, directory: Path) -> None:
        """Read what is there; the directory may be new.

        Raises:
            CaseError, CorpusError: What is there is not valid, or cannot be read.
        """
        self._directory = directory
        self._names: dict[str, set[str]] = {}
        self._known: set[str] = set()
        self._new: dict[str, list[bytes]] = {}
        self._again = 0
        for name, entry in read_corpus(directory) if directory.is_dir() else ():
            self._known.add(digest(entry.case))
            self._names.setdefault(name, set()).add(entry.case.id)

    def knows(self, case: Case) -> bool:
        """Whether an equal case is there, whatever its id."""
        return digest(case) in self._known

    def add(self, family: str, entry: Entry) -> bool:
        """Add an entry to a file unless an equal case is there; an id that is taken becomes another one."""
        key = digest(entry.case)
        if key in self._known:
            self._again += 1
            return False
        if len(self._known) >= MAX_CASES:
            raise CorpusError(f"{self._directory}: more than {MAX_CASES} cases")
        self._known.add(key)
        names = self._names.setdefault(family, set())
        if not entry.case.id or entry.case.id in names:
            name = f"{family}-{key[:12]}"
            entry = entry._replace(case=msgspec.structs.replace(entry.case, id=name))
        names.add(entry.case.id)
        self._new.setdefault(family, []).append(entry.line() + b"\n")
        return True

    def write(self) -> Addition:
        """Write the files that have new entries, each whole; those before it stay if one cannot be written.

        Raises:
            CorpusError: A file cannot be written.
        """
        added = 0
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            for family, lines in sorted(self._new.items()):
                file = self._directory / f"{family}{LINES}"
                old = file.read_bytes() if file.exists() else b""
                separator = b"" if not old or old.endswith(b"\n") else b"\n"
                write_atomically(file, old + separator + b"".join(lines))
                added += len(lines)
        except OSError as error:
            raise CorpusError(f"{error.filename or self._directory}: {reason_of(error)}") from error
        self._new.clear()
        return Addition(added, self._again)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """One writer at a time: the directory's lock, which ends with its process.

    A directory that is new, and into which nothing comes because of an error, is gone again.

    Raises:
        CorpusError: Somebody else writes to it, or it cannot be made.
    """
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CorpusError(f"{directory}: {reason_of(error)}") from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise CorpusError(f"{directory}: another process writes to this corpus") from None
    except BaseException:
        if new and not any(directory.iterdir()):
            directory.rmdir()
        raise
    finally:
        os.close(handle)


def write_new(directory: Path, entries: Iterable[tuple[str, Entry]]) -> int:
    """Write a corpus into a directory that has none; gives the number of cases.

    Raises:
        CorpusError: There are cases already, or a file cannot be written.
    """
    if directory.exists() and corpus_files(directory):
        raise CorpusError(f"{directory}: has cases already")
    writer = CorpusWriter(directory)
    for family, entry in entries:
        writer.add(family, entry)
    return writer.write().added
