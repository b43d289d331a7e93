"""Coverage for a terminal, and as CSV."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, TypeVar

from emufuzz.arch.leaves import LEAVES, family_of, leaf_rows
from emufuzz.fuzz.cells import UNKNOWN_CPL, Cell
from emufuzz.report.columns import table
from emufuzz.report.coverage.judged import excuses, shares
from emufuzz.report.coverage.model import Coverage, Entry, grouped
from emufuzz.report.coverage.reach import REASONS, leaf_share, modes_of, never_reached
from emufuzz.report.plain import printable, span

T = TypeVar("T")

#: Family of a case whose instruction was not decoded, or of a leaf that the tables do not have.
UNDECODED: Final = "undecoded"
CSV_FIELDS: Final = (
    "leaf", "mnemonic", "family", "mode", "cpl", "outcome", "path", "cases", "findings", "first", "code",
)  # fmt: skip
_HEADERS: Final = ("leaves", "cells", "cases", "outcomes", "exceptions", "in findings")
_EXCUSES: Final = 20
_WRAP: Final = 8  # leaves on a line
_GROWTH: Final = 12  # lines of growth


def family(leaf: str) -> str:
    """The family of a leaf, also of none."""
    return family_of(leaf) if leaf in LEAVES else UNDECODED


def percent(part: int, whole: int) -> str:
    """`12.3 %`; `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def coverage_lines(coverage: Coverage, width: int) -> Iterator[str]:
    """The coverage as tables for people."""
    for line in _lines(coverage, width):
        yield printable(line)


def _lines(coverage: Coverage, width: int) -> Iterator[str]:
    reached, possible = leaf_share(coverage)
    yield coverage.title
    yield (
        f"{coverage.cases:,} cases in {len(coverage.entries):,} cells; {reached:,} of {possible:,} leaves "
        f"that KVM implements ({percent(reached, possible)}); {coverage.buckets:,} findings"
    )
    yield from _table("family", coverage, lambda cell: family(cell.leaf), width)
    yield from _table("mode", coverage, lambda cell: cell.mode or "unknown", width)
    yield from _table("CPL", coverage, lambda cell: cpl_text(cell.cpl), width)
    if any(cell.path for cell in coverage.entries):
        yield from _table("path", coverage, lambda cell: cell.path or "flat", width)
    yield from _table("outcome", coverage, lambda cell: cell.outcome or "unknown", width)
    yield from _oracles(coverage, width)
    yield from _growth(coverage, width)
    yield from _never(coverage)


def cpl_text(cpl: int) -> str:
    """A CPL, or that it was not noted."""
    return "unknown" if cpl == UNKNOWN_CPL else str(cpl)


def _table(name: str, coverage: Coverage, of: Callable[[Cell], str], width: int) -> Iterator[str]:
    groups: dict[str, list[tuple[Cell, Entry]]] = defaultdict(list)
    for cell, entry in coverage.entries.items():
        groups[of(cell)].append((cell, entry))
    rows = []
    for key in sorted(groups):
        g = grouped(groups[key])
        leaves = f"{g.leaves:,}" if name != "family" else f"{g.leaves:,} of {_size(key, coverage)}"
        numbers = (g.cells, g.cases, g.outcomes, g.exceptions, g.findings)
        rows.append((key, leaves, *(f"{n:,}" for n in numbers)))
    yield ""
    yield from table((name, *_HEADERS), rows, width)


def _size(name: str, coverage: Coverage) -> int:
    """Leaves of a family that can be reached in the modes."""
    modes = set(coverage.modes)
    return sum(1 for row in leaf_rows() if family(row.leaf) == name and modes_of(row.leaf) & modes)


def _oracles(coverage: Coverage, width: int) -> Iterator[str]:
    if not coverage.verdicts:
        return
    rows = [
        (
            name,
            f"{share.cases:,}",
            f"{share.agreed:,}",
            f"{share.objected:,}",
            percent(share.agreed + share.objected, share.cases),
            percent(share.vouched, share.fields),
        )
        for name, share in shares(coverage).items()
    ]
    yield ""
    yield from table(
        ("oracle", "cases asked", "agreed", "objects", "judged", "fields vouched for"), rows, width
    )
    found = excuses(coverage)
    if not found:
        return
    yield ""
    shown = [(e.oracle, e.reason, f"{e.cases:,}", f"{e.fields:,}", f"{e.leaves:,}") for e in found[:_EXCUSES]]
    yield from table(
        ("oracle", "not compared because of", "cases", "fields in sample", "leaves"), shown, width
    )
    if len(found) > _EXCUSES:
        yield f"and {len(found) - _EXCUSES:,} more reasons (--json lists all)"


def thinned(points: Sequence[T], most: int) -> list[T]:
    """At most so many of the points, at equal distances, the last one among them."""
    count = min(len(points), most)
    return [points[(i + 1) * len(points) // count - 1] for i in range(count)]


def _growth(coverage: Coverage, width: int) -> Iterator[str]:
    """How the campaign grew over its time; over its cases if that is not known."""
    names = ("cases", "cells", "leaves x modes", "findings")
    if coverage.elapsed:
        rows = [(span(m.seconds), *_numbers(m[1:])) for m in thinned(coverage.elapsed, _GROWTH)]
        yield ""
        yield from table(("after", *names), rows, width)
    elif coverage.growth:
        yield ""
        yield from table(names, [_numbers(point) for point in thinned(coverage.growth, _GROWTH)], width)


def _numbers(values: Iterable[int]) -> tuple[str, ...]:
    return tuple(f"{n:,}" for n in values)


def _never(coverage: Coverage) -> Iterator[str]:
    never = never_reached(coverage)
    yield ""
    yield f"never reached: {len(never):,} of {len(leaf_rows()):,} leaves"
    for reason in REASONS:
        leaves = [each.row for each in never if each.reason == reason]
        if leaves:
            yield f"  {len(leaves):,}: {reason}"
        if reason == REASONS[0]:
            for start in range(0, len(leaves), _WRAP):
                part = leaves[start : start + _WRAP]
                yield f"    {', '.join(f'{row.leaf} {row.mnemonic}' for row in part)}"


def coverage_csv(coverage: Coverage) -> Iterator[str]:
    """One line per cell, after the names of the columns; lines end as RFC 4180 says but for the CR."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_FIELDS)
    for cell, entry in coverage.entries.items():
        leaf, mode, cpl, outcome, path = cell
        mnemonic = LEAVES[leaf].mnemonic if leaf in LEAVES else ""
        level = "" if cpl == UNKNOWN_CPL else cpl
        counts = entry.cases, entry.findings, entry.where, entry.code.hex()
        writer.writerow((leaf, mnemonic, family(leaf), mode, level, outcome, path, *counts))
        yield out.getvalue()
        out.seek(0)
        out.truncate()
    yield out.getvalue()
