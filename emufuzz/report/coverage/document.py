"""Coverage as JSON, which can be read again: the other side of a comparison, or for other programs."""

from __future__ import annotations

from typing import Annotated, Any, Final

import msgspec

from emufuzz.arch.leaves import LEAVES
from emufuzz.fuzz.cells import UNKNOWN_CPL, Cell
from emufuzz.report.coverage.growth import Count, Moment, Point
from emufuzz.report.coverage.judged import excuses, shares
from emufuzz.report.coverage.model import Coverage, Entry
from emufuzz.report.coverage.reach import leaf_share, never_reached
from emufuzz.report.coverage.text import family

#: What is written; 1, which knows nothing of time, is read, too.
FORMAT: Final = 2
_READABLE: Final = (1, FORMAT)
#: Name of the member that tells a report from a case.
MARK: Final = "coverage_format"
#: Bytes of JSON above which a report is none.
MAX_DOCUMENT: Final = 1 << 28


class CellRow(msgspec.Struct, forbid_unknown_fields=True):
    """A cell; `first` is where its first case is, `code` its code bytes in hex."""

    leaf: str
    mode: str
    cpl: Annotated[int, msgspec.Meta(ge=UNKNOWN_CPL, le=3)]
    outcome: str
    path: str
    cases: Count
    findings: Count
    first: str
    code: str


class JudgedRow(msgspec.Struct, forbid_unknown_fields=True):
    """What an oracle said of a leaf; `why` as in emufuzz.fuzz.judging."""

    oracle: str
    leaf: str
    why: str
    n: Count


class Document(msgspec.Struct, forbid_unknown_fields=True):
    """A report. What follows from the rest (`summary`, `never`, `shares`, `excuses`) is for other readers."""

    coverage_format: int
    title: str
    campaign: bool
    modes: tuple[str, ...]
    oracles: tuple[str, ...]
    findings: Count
    summary: dict[str, Any]
    cells: list[CellRow]
    never: list[dict[str, str]]
    verdicts: list[JudgedRow]
    fields: list[JudgedRow]
    shares: dict[str, Any]
    excuses: list[dict[str, Any]]
    growth: list[Point]
    elapsed: list[Moment] = []


class _Head(msgspec.Struct):
    """What tells which report it is."""

    coverage_format: int


class DocumentError(ValueError):
    """JSON that is no report of this format; the message says why."""


def to_json(coverage: Coverage) -> bytes:
    """The report, its cells in order."""
    document = Document(
        FORMAT,
        coverage.title,
        coverage.campaign,
        coverage.modes,
        coverage.oracles,
        coverage.buckets,
        _summary(coverage),
        [CellRow(*cell, *_entry(entry)) for cell, entry in coverage.entries.items()],
        [
            {"leaf": row.leaf, "mnemonic": row.mnemonic, "family": family(row.leaf), "reason": reason}
            for row, reason in never_reached(coverage)
        ],
        [JudgedRow(*key, n) for key, n in coverage.verdicts.items()],
        [JudgedRow(*key, n) for key, n in coverage.fields.items()],
        {name: share._asdict() for name, share in shares(coverage).items()},
        [excuse._asdict() for excuse in excuses(coverage)],
        coverage.growth,
        coverage.elapsed,
    )
    return msgspec.json.format(msgspec.json.encode(document), indent=1) + b"\n"


def _entry(entry: Entry) -> tuple[int, int, str, str]:
    return entry.cases, entry.findings, entry.where, entry.code.hex()


def _summary(coverage: Coverage) -> dict[str, Any]:
    reached, possible = leaf_share(coverage)
    return {
        "cases": coverage.cases,
        "cells": len(coverage.entries),
        "leaves": reached,
        "possible_leaves": possible,
        "findings": coverage.buckets,
    }


def from_json(data: bytes) -> Coverage:
    """A report that was written before.

    Raises:
        DocumentError: It is none.
    """
    if len(data) > MAX_DOCUMENT:
        raise DocumentError(f"longer than {MAX_DOCUMENT >> 20} MiB")
    try:
        _check_format(data)
        document = msgspec.json.decode(data, type=Document)
        entries = {_cell(row): _count(row) for row in document.cells}
    except DocumentError:
        raise
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise DocumentError(f"not a coverage report: {error}") from error
    return Coverage(
        document.title,
        document.modes,
        entries,
        document.oracles,
        {(row.oracle, row.leaf, row.why): row.n for row in document.verdicts},
        {(row.oracle, row.leaf, row.why): row.n for row in document.fields},
        document.findings,
        document.growth,
        document.elapsed,
        document.campaign,
    )


def _check_format(data: bytes) -> None:
    """Raise DocumentError for a report of a format that nobody here knows."""
    found = msgspec.json.decode(data, type=_Head).coverage_format
    if found not in _READABLE:
        raise DocumentError(f"{MARK}: {found}, this emufuzz knows up to {FORMAT}")


def _cell(row: CellRow) -> Cell:
    return Cell(row.leaf, row.mode, row.cpl, row.outcome, row.path)


def _count(row: CellRow) -> Entry:
    return Entry(row.cases, row.findings, row.first, bytes.fromhex(row.code))


def leaf_name(leaf: str) -> str:
    """A leaf with its mnemonic."""
    mnemonic = LEAVES[leaf].mnemonic if leaf in LEAVES else ""
    return f"{leaf} {mnemonic}".strip() or "undecoded"
