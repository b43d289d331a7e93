"""`emufuzz corpus export`: a corpus as JSON lines, as a libFuzzer directory, as MOO files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from emufuzz.case.moo import MooTest
from emufuzz.case.moo_write import MooHeader, moo_bytes
from emufuzz.cli.corpus_sources import CASES, LIBFUZZER, MOO
from emufuzz.cli.corpus_write import Counts
from emufuzz.cli.errors import InputError
from emufuzz.cli.progress import counted
from emufuzz.fuzz.corpus.directory import Entry, read_corpus
from emufuzz.fuzz.corpus.moo_export import MooExporter, UnfitError
from emufuzz.fuzz.files import reason_of, write_atomically

#: Name of a file -> its contents.
Files = dict[str, bytes]

CPU: Final = "KVM"


def export_to(directory: Path, to: Path, form: str, *, force: bool) -> Counts:
    """Write the cases of a corpus in another form.

    Raises:
        InputError: There is no such form, a file is in the way, or cannot be written.
        CaseError, CorpusError: The corpus is not valid.
    """
    makers: dict[str, Callable[[Path, Counts], Files]] = {CASES: _lines, LIBFUZZER: _binaries, MOO: _moo}
    if form not in makers:
        raise InputError("--format", f"unknown format {form!r}, known are {', '.join(makers)}")
    counts = Counts()
    files = makers[form](directory, counts)
    targets = (
        {to: next(iter(files.values()))} if form == CASES else {to / name: files[name] for name in files}
    )
    try:
        _write(targets, to if form != CASES else to.parent, force=force)
    except OSError as error:
        raise InputError("--to", f"{error.filename or to}: {reason_of(error)}") from error
    return counts


def _write(targets: dict[Path, bytes], folder: Path, *, force: bool) -> None:
    """Write the files, each whole, unless one is in the way."""
    for file in targets:
        if file.is_dir() or (not force and os.path.lexists(file)):
            raise InputError("--to", f"{file}: exists" + ("" if file.is_dir() else " (--force replaces it)"))
    folder.mkdir(parents=True, exist_ok=True)
    for file, data in targets.items():
        write_atomically(file, data)


def _entries(directory: Path, counts: Counts) -> Iterator[tuple[str, Entry]]:
    for family, entry in counted(read_corpus(directory)):
        counts.read += 1
        yield family, entry


def _lines(directory: Path, counts: Counts) -> Files:
    """All in one file of JSON lines."""
    lines = [entry.line() + b"\n" for _, entry in _entries(directory, counts)]
    counts.written = len(lines)
    return {"": b"".join(lines)}


def _binaries(directory: Path, counts: Counts) -> Files:
    """A file per case, named after its SHA-1 as libFuzzer does."""
    from emufuzz.case.codec import encode_case

    files: Files = {}
    for _, entry in _entries(directory, counts):
        try:
            data = encode_case(entry.case)
        except ValueError as error:
            counts.skipped[str(error)] += 1
            continue
        files[hashlib.sha1(data, usedforsecurity=False).hexdigest()] = data
        counts.written += 1
    return files


def _moo(directory: Path, counts: Counts) -> Files:
    """A file per file of the corpus that has a case which MOO can hold."""
    exporter = MooExporter()
    tests: dict[str, list[tuple[MooTest, dict[str, int]]]] = {}
    for family, entry in _entries(directory, counts):
        made = tests.setdefault(family, [])
        try:
            exported = exporter.export(entry.case, len(made))
        except UnfitError as error:
            counts.skipped[str(error)] += 1
            continue
        made.append((exported.test, exported.mask))
        counts.written += 1
    return {
        f"{family}.moo": moo_bytes(MooHeader(CPU), [test for test, _ in made], [mask for _, mask in made])
        for family, made in tests.items()
        if made
    }
