"""`emufuzz corpus add`, `merge` and `distill`: what writes a corpus, and what it says about it."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from emufuzz.case.model import Case
from emufuzz.cli.corpus_sources import FORMATS, Source
from emufuzz.cli.errors import InputError
from emufuzz.cli.progress import counted
from emufuzz.fuzz.corpus.directory import (
    CorpusWriter,
    Entry,
    corpus_files,
    family_name,
    locked,
    read_corpus,
)
from emufuzz.fuzz.corpus.distill import Progress, distill
from emufuzz.fuzz.corpus.observe import Observer
from emufuzz.fuzz.corpus.reduce import reduce_case

#: Seconds between lines about progress.
_PERIOD: Final = 5.0
_NOT_RUN: Final = "its subject cannot take it, or fails"


@dataclass(slots=True)
class Counts:
    """What became of cases.

    Attributes:
        read: How many the sources had.
        written: How many were written.
        skipped: Those that were not, by reason.
    """

    read: int = 0
    written: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def report(counts: Counts, *, as_json: bool) -> str:
    """The counts as text, or as one JSON object."""
    if as_json:
        skipped = dict(counts.skipped.most_common())
        return json.dumps({"read": counts.read, "written": counts.written, "skipped": skipped})
    lines = [f"{counts.read} cases read, {counts.written} written"]
    return "\n".join(lines + [f"{number} skipped: {why}" for why, number in counts.skipped.most_common()])


def add_all(directory: Path, names: Sequence[str], form: str) -> Counts:
    """Add all cases of the sources to a corpus."""
    counts, sources = Counts(), _sources(names, form)
    with locked(directory):
        writer, observer = CorpusWriter(directory), Observer(arcs=False)
        for entry in counted(_read(sources, counts)):
            observed = observer.observe(entry.case)
            if observed is None:
                counts.skipped[_NOT_RUN] += 1
            elif not writer.add(family_name(entry.case, observed.outcome), entry):
                counts.skipped["is in the corpus"] += 1
        counts.written = writer.write().added
    return counts


def merge_new(
    directory: Path, names: Sequence[str], form: str, aspects: Sequence[str], *, reduce: bool
) -> Counts:
    """Add cases that cover something that nothing before them does, cut down to that if asked for."""
    counts, sources = Counts(), _sources(names, form)
    with locked(directory):
        writer, observer = CorpusWriter(directory), Observer(aspects)
        covered: set[int] = set()
        for _, entry in counted(read_corpus(directory)):
            observed = observer.observe(entry.case)
            covered |= observed.elements if observed is not None else frozenset()
        for entry in counted(_read(sources, counts)):
            observed = observer.observe(entry.case)
            if observed is None:
                counts.skipped[_NOT_RUN] += 1
            elif observed.elements <= covered:
                counts.skipped["covers nothing new"] += 1
            else:
                new = observed.elements - covered
                covered |= new
                cut = Entry(reduce_case(entry.case, partial(_covers, observer, new))) if reduce else entry
                writer.add(family_name(entry.case, observed.outcome), cut)
        counts.written = writer.write().added
    return counts


def _covers(observer: Observer, wanted: frozenset[int], case: Case) -> bool:
    return observer.covers(case, wanted)


def distill_to(out: Path, names: Sequence[str], form: str, aspects: Sequence[str], *, reduce: bool) -> Counts:
    """Write the distilled corpus of the sources into a directory without cases."""
    counts, sources = Counts(), _sources(names, form)
    with locked(out):
        if corpus_files(out):
            raise InputError(str(out), "has cases already")
        observer = Observer(aspects)
        cases = (entry.case for entry in _read(sources, counts))
        chosen = distill(cases, observer, Reporter(), reduce=reduce)
        writer, numbers = CorpusWriter(out), Counter[str]()
        plain = Observer(arcs=False)
        for case in chosen:
            observed = plain.observe(case)
            if observed is None:
                raise InputError(case.id, "cut down, it cannot be run any more")
            family = family_name(case, observed.outcome)
            name = f"{family}-{numbers[family]}-{observed.outcome.leaf or 'none'}"
            numbers[family] += 1
            writer.add(family, Entry(msgspec.structs.replace(case, id=name)))
        counts.written = writer.write().added
    left = counts.read - counts.written
    if left:
        counts.skipped["covers nothing that those written do not, or cannot be run"] = left
    return counts


def _sources(names: Sequence[str], form: str) -> list[Source]:
    """The sources, all of which have to be there before anything is done."""
    if form and form not in FORMATS:
        raise InputError("--format", f"unknown format {form!r}, known are {', '.join(FORMATS)}")
    return [Source(name, form) for name in names]


def _read(sources: Sequence[Source], counts: Counts) -> Iterator[Entry]:
    for source in sources:
        for entry in source.entries():
            counts.read += 1
            yield entry
        counts.skipped += source.skipped
        counts.read += source.skipped.total()


class Reporter:
    """Lines about progress on standard error, not too many of them."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._step = ""

    def __call__(self, progress: Progress) -> None:
        """Say how far it has come, if it is time to."""
        now = time.monotonic()
        if progress.step == self._step and now < self._last + _PERIOD:
            return
        self._last, self._step = now, progress.step
        print(
            f"{progress.step:<8} {progress.cases:>9,} cases  {progress.kept:>7,} kept  "
            f"{progress.elements:>7,} covered  {progress.refused:>7,} refused",
            file=sys.stderr,
            flush=True,
        )
