"""Coverage as one HTML page that needs no network: opcode maps as heat maps, and all that is counted.

The page holds the cells; what it shows of them it counts itself, as its switches say. Its size depends on
the number of cells, not of cases.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from typing import Any, Final, NamedTuple

import jinja2

from emufuzz.arch.leaves import LeafRow, leaf_rows
from emufuzz.arch.modes import MODES
from emufuzz.case.paths import PATHS
from emufuzz.report.coverage.judged import excuses, shares
from emufuzz.report.coverage.model import Coverage, grouped, is_exception
from emufuzz.report.coverage.reach import REASONS, leaf_share, modes_of, never_reached, why_never
from emufuzz.report.coverage.text import family, percent, thinned
from emufuzz.report.plain import span

#: The opcode maps: name as in LeafRow.map, the bytes before the opcode, a title.
MAPS: Final = (
    ("1byte", "", "One-byte opcodes"),
    ("0f", "0F ", "Two-byte opcodes, 0F"),
    ("0f38", "0F 38 ", "Three-byte opcodes, 0F 38"),
)
#: Examples per (leaf, mode, path).
_EXAMPLES: Final = 2
_CHART: Final = (640, 200)  # width and height of a picture of growth
_ROWS: Final = 12  # of its numbers


class Slot(NamedTuple):
    """An opcode of a map: its place, its leaves, and what it is called."""

    id: str
    opcode: str
    name: str
    leaves: list[LeafRow]

    @property
    def unfolds(self) -> bool:
        """Whether the opcode is a group, or depends on a prefix, mode or ModRM."""
        return len(self.leaves) > 1

    @property
    def implemented(self) -> bool:
        """Whether KVM can execute any of it."""
        return any(row.implemented for row in self.leaves)


def page(coverage: Coverage) -> str:
    """The page."""
    never = never_reached(coverage)
    reached, possible = leaf_share(coverage)
    total = grouped(coverage.entries.items())
    return _template("page.html").render(
        coverage=coverage,
        total=total,
        reached=reached,
        possible=possible,
        share=percent(reached, possible),
        maps=[(name, lead, title, _rows(name, lead)) for name, lead, title in MAPS],
        groups=[slot for name, lead, _ in MAPS for row in _rows(name, lead) for slot in row if slot.unfolds],
        never=[(why, [each.row for each in never if each.reason == why]) for why in REASONS],
        never_count=len(never),
        shares=shares(coverage),
        excuses=excuses(coverage),
        percent=percent,
        axes=list(_axes(coverage)),
        slot_id=slot_id,
        data=_embedded(page_data(coverage)),
        style=_file("page.css"),
        script=_file("page.js"),
    )


@cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(_file(name))


def _file(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text("utf-8")


def slot_id(row: LeafRow) -> str:
    """The id of the opcode that a leaf belongs to."""
    return f"slot-{row.map}-{row.opcode:02x}"


@cache
def _rows(name: str, lead: str) -> list[list[Slot]]:
    """The 16 rows of a map."""
    leaves: list[list[LeafRow]] = [[] for _ in range(256)]
    for row in leaf_rows():
        if row.map == name:
            leaves[row.opcode].append(row)
    slots = [
        Slot(slot_id(rows[0]), f"{lead}{opcode:02X}", _name(rows), rows) for opcode, rows in enumerate(leaves)
    ]
    return [slots[start : start + 16] for start in range(0, 256, 16)]


def _name(rows: list[LeafRow]) -> str:
    """What an opcode is called: its mnemonic, that of its leaves, or the name of its group."""
    names = list(dict.fromkeys(row.mnemonic for row in rows if row.implemented))
    group = rows[0].selector.partition("/")[0] if "/" in rows[0].selector else ""
    if group or not names:
        return group or rows[0].mnemonic
    return names[0]


def page_data(coverage: Coverage) -> dict[str, Any]:
    """What the page counts with. Cells are flat: leaf, mode, CPL, outcome, path, cases, findings of each."""
    leaves = _leaf_table(coverage)
    place = {leaf[0]: i for i, leaf in enumerate(leaves)}
    modes = _names(MODES, (cell.mode for cell in coverage.entries))
    paths = _names(PATHS, (cell.path for cell in coverage.entries), seen_only=True)
    outcomes = sorted({cell.outcome for cell in coverage.entries})
    cells: list[int] = []
    examples: list[tuple[int, int, int, int, int, str, str]] = []
    shown: dict[tuple[str, str, str], int] = {}
    for (leaf, mode, cpl, outcome, path), entry in coverage.entries.items():
        key = place[leaf], modes.index(mode), cpl, outcomes.index(outcome), paths.index(path)
        cells += (*key, entry.cases, entry.findings)
        count = shown.get((leaf, mode, path), 0)
        if entry.where and count < _EXAMPLES:
            shown[leaf, mode, path] = count + 1
            examples.append((*key, entry.where, entry.code.hex()))
    return {
        "campaign": coverage.campaign,
        "leaves": leaves,
        "modes": modes,
        "paths": paths,
        "outcomes": [[name, is_exception(name)] for name in outcomes],
        "cells": cells,
        "examples": examples,
        "verdicts": [
            [oracle, place.get(leaf, -1), why, n] for (oracle, leaf, why), n in coverage.verdicts.items()
        ],
        "fields": [
            [oracle, place.get(leaf, -1), why, n] for (oracle, leaf, why), n in coverage.fields.items()
        ],
    }


def _leaf_table(coverage: Coverage) -> list[list[Any]]:
    """All leaves, then those that the tables do not have: id, slot, mnemonic, what it is, why never."""
    seen = coverage.leaves()
    table: list[list[Any]] = []
    for row in leaf_rows():
        why = "" if row.leaf in seen else why_never(row, coverage.modes)
        what = f"{family(row.leaf)}; {row.handler or 'no handler'}; {row.status}"
        absent = [mode for mode in MODES if mode not in modes_of(row.leaf)]
        table.append([row.leaf, slot_id(row), row.mnemonic, what, why, absent])
    known = {row.leaf for row in leaf_rows()}
    others = sorted({cell.leaf for cell in coverage.entries} - known)
    return table + [
        [leaf, "slot-none", leaf or "undecoded", "not in the opcode tables", "", []] for leaf in others
    ]


def _names(known: tuple[str, ...], used: Iterator[str], *, seen_only: bool = False) -> list[str]:
    """Known names in their order, then others that occur, sorted."""
    seen = set(used)
    first = [name for name in known if name in seen or not seen_only]
    return [*first, *sorted(seen - set(known))]


def _embedded(value: Any) -> str:
    """JSON that ends no script element, whatever is in it."""
    text = json.dumps(value, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


class Chart(NamedTuple):
    """A line of growth: what it shows, how much there is at the end, and the points of an SVG polyline."""

    name: str
    last: int
    points: str


class Axis(NamedTuple):
    """Growth over something: its id, its name, how far it goes, its charts, and some of it as numbers."""

    id: str
    name: str
    end: str
    charts: list[Chart]
    rows: list[tuple[str, int, int, int]]


def _axes(coverage: Coverage) -> Iterator[Axis]:
    """Growth over the time, if that is known, and over the cases."""
    elapsed, growth = coverage.elapsed, coverage.growth
    if elapsed and elapsed[-1].seconds:
        lines = [(m.seconds, m[2:]) for m in elapsed]
        rows = [(span(m.seconds), *m[2:]) for m in thinned(elapsed, _ROWS)]
        yield Axis("elapsed", "time", span(elapsed[-1].seconds), list(_charts(lines)), rows)
    if growth and growth[-1].cases:
        lines = [(float(p.cases), p[1:]) for p in growth]
        shown = [(f"{p.cases:,}", *p[1:]) for p in thinned(growth, _ROWS)]
        yield Axis("growth", "cases", f"{growth[-1].cases:,} cases", list(_charts(lines)), shown)


def _charts(lines: Sequence[tuple[float, tuple[int, int, int]]]) -> Iterator[Chart]:
    """A chart for each number, from (0, 0) to where the last one is."""
    width, height = _CHART
    end, lasts = lines[-1]
    for i, name in enumerate(("cells", "leaves x modes", "findings")):
        most = max(lasts[i], 1)
        points = [(0.0, float(height))]
        points += [(width * at / end, height * (1 - numbers[i] / most)) for at, numbers in lines]
        yield Chart(name, lasts[i], " ".join(f"{x:.1f},{y:.1f}" for x, y in points))
