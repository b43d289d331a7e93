"""What `emufuzz corpus` reads cases from: files and directories of several forms, and generators."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj
from emufuzz.case.model import Case
from emufuzz.case.moo import is_moo
from emufuzz.case.moo_vectors import moo_vectors
from emufuzz.case.vectors import read_cases, vector_of
from emufuzz.cli.documents import CAMPAIGN_FILE, STDIN, Document, files_of, read_documents
from emufuzz.cli.errors import InputError
from emufuzz.fuzz.corpus.directory import MAX_CASES, Entry

CASES: Final = "cases"
LIBFUZZER: Final = "libfuzzer"
MOO: Final = "moo"
CAMPAIGN: Final = "campaign"
#: What `--format` takes; by default what a source looks like decides.
FORMATS: Final = (CASES, LIBFUZZER, MOO, CAMPAIGN)

_ZSTD: Final = ".zst"
_GENERATED: Final = re.compile(r"(flat|paths|handlers):(\d{1,20}):(\d{1,9})")
#: The source of the cases that are written for branches which generated ones do not reach.
CRAFTED: Final = "crafted:"
_BATCH: Final = 2048
#: Bytes of a file of a libFuzzer directory; none that decodes to a case is nearly as long.
_MAX_BINARY: Final = 1 << 20


class Source:
    """One source of cases.

    Attributes:
        name: As it was given.
        skipped: Counts what became no entry, by reason.
    """

    def __init__(self, name: str, form: str = "") -> None:
        """`form` is one of FORMATS; empty to tell by the look.

        Raises:
            InputError: There is no such file, directory or generator.
        """
        self.name = name
        self.skipped: Counter[str] = Counter()
        generated = _GENERATED.fullmatch(name)
        self._generated = generated.groups() if generated and not form else None
        self._path = Path(name)
        if not self._is_made and name != STDIN and not self._path.exists():
            raise InputError(name, "no such file or directory")
        self._form = form or self._looks_like()

    @property
    def _is_made(self) -> bool:
        return self._generated is not None or self.name == CRAFTED

    def entries(self) -> Iterator[Entry]:
        """The cases of the source, in order.

        Raises:
            InputError, CaseError, OSError: It cannot be read, or something in it is no case.
        """
        if self.name == CRAFTED:
            yield from _crafted()
            return
        if self._generated is not None:
            yield from _generated_cases(*self._generated)
            return
        read: dict[str, Callable[[], Iterator[Entry]]] = {
            CASES: self._cases,
            LIBFUZZER: self._binaries,
            MOO: self._moo,
            CAMPAIGN: self._findings,
        }
        for number, entry in enumerate(read[self._form]()):
            if number >= MAX_CASES:
                raise InputError(self.name, f"more than {MAX_CASES} cases")
            yield entry

    def _looks_like(self) -> str:
        path = self._path
        if self.name == STDIN or not path.is_dir():
            return MOO if is_moo(path) else CASES
        if (path / CAMPAIGN_FILE).is_file():
            return CAMPAIGN
        names = [found.name for found in islice(path.iterdir(), _BATCH)]
        textual = any(name.endswith((".json", ".jsonl")) for name in names)
        if not textual and any((path / name).is_file() and not name.startswith(".") for name in names):
            return MOO if all(is_moo(name) for name in names) else LIBFUZZER
        return CASES

    def _cases(self) -> Iterator[Entry]:
        for file in files_of(self._path):
            if file.suffix == _ZSTD:
                yield from (Entry(case, expect) for case, expect in read_cases(file))
                continue
            for document in read_documents(file):
                yield _entry(document)

    def _moo(self) -> Iterator[Entry]:
        files = sorted(self._path.iterdir()) if self._path.is_dir() else [self._path]
        for file in files:
            for case, expect in moo_vectors(file, self.skipped):
                yield Entry(case, expect)

    def _binaries(self) -> Iterator[Entry]:
        """The files below a libFuzzer directory; any bytes are a case."""
        from emufuzz.case.codec import decode_case

        files = sorted(self._path.rglob("*")) if self._path.is_dir() else [self._path]
        for file in files:
            if file.is_symlink() or not file.is_file() or file.name.startswith("."):
                continue
            with file.open("rb") as stream:
                data = stream.read(_MAX_BINARY + 1)
            if len(data) > _MAX_BINARY:
                raise InputError(str(file), f"more than {_MAX_BINARY >> 20} MiB")
            yield Entry(decode_case(data))

    def _findings(self) -> Iterator[Entry]:
        """The cases of a campaign's findings, shrunk ones if they are, and those that guided it."""
        from emufuzz.fuzz.guided.packed import unpack
        from emufuzz.fuzz.store import StoreError, StoreView
        from emufuzz.fuzz.store.corpus import corpus_of
        from emufuzz.fuzz.triage.loaded import load_all

        try:
            view = StoreView(self._path)
            try:
                for loaded in load_all(view):
                    yield Entry(loaded.finding.case)
                if view.rows("SELECT 1 FROM corpus LIMIT 1"):
                    kept = corpus_of(view)
                    for entry in kept.entries:
                        yield Entry(unpack(entry.data, kept.pieces))
            finally:
                view.close()
        except StoreError as error:
            raise InputError("", str(error)) from error


def _entry(document: Document) -> Entry:
    """A case, a vector line, or the case of a finding."""
    try:
        return _read(document.value)
    except CaseError as error:
        raise InputError(document.where, str(error)) from error


def _read(value: dict[str, Any]) -> Entry:
    if "expect" in value:
        return Entry(*vector_of(value))
    if "case" in value:
        return Entry(case_from_obj(value["case"]))
    return Entry(case_from_obj(value))


def _generated_cases(kind: str, seed: str, count: str) -> Iterator[Entry]:
    """Cases of one of the generators."""
    made = {"flat": _flat, "paths": _paths, "handlers": _handlers}[kind](int(seed))
    return (Entry(case) for case in islice(made, int(count)))


def _crafted() -> Iterator[Entry]:
    from emufuzz.fuzz.corpus.crafted import crafted_cases

    return (Entry(case) for case in crafted_cases())


def _flat(seed: int) -> Iterator[Case]:
    from emufuzz.fuzz.generate import generate_batch

    number = 0
    while True:
        yield from generate_batch(seed, number, _BATCH)
        number += 1


def _paths(seed: int) -> Iterator[Case]:
    from emufuzz.fuzz.kvm.generate import PathGenerator, PathOptions

    number = 0
    while True:
        yield from PathGenerator(seed, number, PathOptions()).cases(_BATCH)
        number += 1


def _handlers(seed: int) -> Iterator[Case]:
    """Each instruction through its exit's handler, and behind the forced-emulation prefix."""
    from emufuzz.fuzz.handlers.generate import generate
    from emufuzz.fuzz.handlers.observe import with_prefix

    number = 0
    while True:
        _, case = generate(seed, number)
        yield case
        yield with_prefix(case)
        number += 1
