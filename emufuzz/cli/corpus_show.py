"""`emufuzz corpus list` and `show`: what is in a corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emufuzz.cli.errors import InputError
from emufuzz.cli.progress import counted
from emufuzz.fuzz.corpus.directory import Entry, corpus_files, read_corpus, read_file
from emufuzz.fuzz.corpus.observe import Observer
from emufuzz.report.columns import output_width, table
from emufuzz.report.disasm import disassemble
from emufuzz.report.explain import summary
from emufuzz.report.fields import outcome_fields
from emufuzz.report.plain import printable
from emufuzz.report.state import state_lines

Row = dict[str, Any]


def listed(directory: Path) -> list[Row]:
    """A row per file.

    Raises:
        InputError: The directory has files, but none of a corpus.
    """
    if not corpus_files(directory) and any(directory.iterdir()):
        raise InputError(str(directory), "no corpus: no .jsonl files in it; `emufuzz corpus add` makes one")
    return [_row(file) for file in counted(corpus_files(directory), "files")]


def _row(file: Path) -> Row:
    observer = Observer(arcs=False)
    cells, cases, vectors, refused = set(), 0, 0, 0
    for entry in read_file(file):
        cases += 1
        vectors += entry.expect is not None
        observed = observer.observe(entry.case)
        if observed is None:
            refused += 1
        else:
            cells.add(observed.cell)
    return {
        "file": file.name,
        "cases": cases,
        "vectors": vectors,
        "refused": refused,
        "bytes": file.stat().st_size,
        "leaves": len({cell[0] for cell in cells} - {""}),
        "modes": len({cell[1] for cell in cells}),
        "cells": len(cells),
    }


def table_of(rows: Sequence[Row]) -> list[str]:
    """The rows as a table, with their sums."""
    if not rows:
        return ["no cases"]
    sums = {
        name: sum(row[name] for row in rows) for name in ("cases", "vectors", "refused", "bytes", "cells")
    }
    rows = [*rows, {"file": "all", "leaves": "", "modes": "", **sums}]
    columns = list(rows[0])
    return table(columns, [[str(row[name]) for name in columns] for row in rows], 1000)


def found(directory: Path, names: Sequence[str]) -> list[tuple[str, Entry]]:
    """The entries of these ids, in the order of the names; `FILE/ID` where an id is not enough.

    Raises:
        InputError: There is no such case, or there are several.
    """
    wanted: dict[str, list[tuple[str, Entry]]] = {name: [] for name in names}
    for family, entry in counted(read_corpus(directory)):
        for name in (entry.case.id, f"{family}/{entry.case.id}"):
            if name in wanted:
                wanted[name].append((f"{family}/{entry.case.id}", entry))
    for name, entries in wanted.items():
        if len(entries) != 1:
            why = f"several cases have this id, among them {entries[0][0]}" if entries else "no such case"
            raise InputError(f"{directory}: {printable(name)}", why)
    return [wanted[name][0] for name in names]


def shown(name: str, entry: Entry) -> Iterator[str]:
    """One case, as text for people."""
    case = entry.case
    yield f"case {printable(name)}: {case.mode}" + (f", path {case.path}" if case.path else "")
    yield from (f"  {line}" for line in disassemble(case))
    yield ""
    yield "before:"
    yield from (f"  {line}" for line in state_lines(case, output_width()))
    yield ""
    observed = Observer(arcs=False).observe(case)
    if observed is None:
        yield "the emulator cannot take this case, or fails"
        return
    leaf, _, cpl, outcome, _ = observed.cell
    yield f"cell: leaf {leaf or 'none'}, CPL {cpl}, {outcome}; {summary(observed.outcome)}"
    yield from (f"  {field}  {value}" for field, value in _changed(entry, observed))


def _changed(entry: Entry, observed: Any) -> Iterator[tuple[str, str]]:
    """Fields of the outcome that are not as before."""
    from emufuzz.report.fields import before_fields

    before = before_fields(entry.case)
    for field, value in outcome_fields(observed.outcome):
        if before.get(field) != value:
            yield field, value
