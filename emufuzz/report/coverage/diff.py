"""What one report covers and the other does not, by family, leaf and cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import msgspec

from emufuzz.arch.leaves import FAMILIES, LEAVES
from emufuzz.fuzz.cells import Cell
from emufuzz.report.columns import table
from emufuzz.report.coverage.document import leaf_name
from emufuzz.report.coverage.model import Coverage
from emufuzz.report.coverage.text import UNDECODED, cpl_text, family
from emufuzz.report.plain import printable

_LEAVES: Final = 40  # names of a family that are listed for people


class FamilyDiff(NamedTuple):
    """A family whose leaves or cells are not the same.

    Attributes:
        family: Its name.
        before, after: How many of its leaves occur in each.
        gone, new: Leaves that only the first, or only the second, has.
        cells_gone, cells_new: Cells likewise, also those of leaves that both have.
    """

    family: str
    before: int
    after: int
    gone: tuple[str, ...]
    new: tuple[str, ...]
    cells_gone: int
    cells_new: int


class Diff(NamedTuple):
    """Two reports compared: families that differ, in the order of the tables; cells of one only."""

    before: Coverage
    after: Coverage
    families: list[FamilyDiff]
    gone: list[Cell]
    new: list[Cell]

    @property
    def lost(self) -> bool:
        """Whether a leaf that the first has is missing in the second."""
        return any(each.gone for each in self.families)


def compare(before: Coverage, after: Coverage) -> Diff:
    """What `after` has not any more, and what it has beyond `before`."""
    gone = sorted(before.entries.keys() - after.entries.keys())
    new = sorted(after.entries.keys() - before.entries.keys())
    names = (*FAMILIES, UNDECODED)
    found = [_family(name, before, after, gone, new) for name in names]
    return Diff(before, after, [each for each in found if each.cells_gone or each.cells_new], gone, new)


def _family(name: str, before: Coverage, after: Coverage, gone: list[Cell], new: list[Cell]) -> FamilyDiff:
    a = {cell.leaf for cell in before.entries if family(cell.leaf) == name}
    b = {cell.leaf for cell in after.entries if family(cell.leaf) == name}
    return FamilyDiff(
        name,
        len(a),
        len(b),
        _in_order(a - b),
        _in_order(b - a),
        sum(family(cell.leaf) == name for cell in gone),
        sum(family(cell.leaf) == name for cell in new),
    )


_PLACES: Final = {leaf: place for place, leaf in enumerate(LEAVES)}


def _in_order(leaves: set[str]) -> tuple[str, ...]:
    return tuple(sorted(leaves, key=lambda leaf: (_PLACES.get(leaf, len(_PLACES)), leaf)))


def diff_lines(diff: Diff, width: int) -> Iterator[str]:
    """The comparison for people."""
    for line in _lines(diff, width):
        yield printable(line)


def _lines(diff: Diff, width: int) -> Iterator[str]:
    yield f"before: {diff.before.title}: {diff.before.cases:,} cases"
    yield f"after:  {diff.after.title}: {diff.after.cases:,} cases"
    if not diff.families:
        yield "the same cells are covered"
        return
    yield f"{len(diff.gone):,} cells are no longer covered, {len(diff.new):,} are new"
    yield ""
    rows = [
        (f.family, f"{f.before:,}", f"{f.after:,}", f"{f.cells_gone:,}", f"{f.cells_new:,}")
        for f in diff.families
    ]
    yield from table(("family", "leaves before", "after", "cells gone", "cells new"), rows, width)
    for what, part in (("no longer covered", "gone"), ("newly covered", "new")):
        yield from _leaves(diff, what, part)


def _leaves(diff: Diff, what: str, part: str) -> Iterator[str]:
    for each in diff.families:
        leaves = getattr(each, part)
        if leaves:
            more = f" and {len(leaves) - _LEAVES:,} more" if len(leaves) > _LEAVES else ""
            whole = ", the whole family" if not (each.after if part == "gone" else each.before) else ""
            names = ", ".join(leaf_name(leaf) for leaf in leaves[:_LEAVES])
            yield ""
            yield f"{what}: {each.family}, {len(leaves):,} leaves{whole}"
            yield f"  {names}{more}"


def diff_json(diff: Diff) -> bytes:
    """The comparison as JSON, with every cell."""
    value: dict[str, Any] = {
        "before": {"title": diff.before.title, "cases": diff.before.cases},
        "after": {"title": diff.after.title, "cases": diff.after.cases},
        "families": [each._asdict() for each in diff.families],
        "gone": [cell._asdict() for cell in diff.gone],
        "new": [cell._asdict() for cell in diff.new],
    }
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def cell_text(cell: Cell) -> str:
    """A cell in words."""
    return f"{leaf_name(cell.leaf)} in {cell.mode or 'unknown'}, CPL {cpl_text(cell.cpl)}: {cell.outcome}"
