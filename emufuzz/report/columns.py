"""Plain text tables that fit a width: columns side by side, or one value under the other."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import Final

GAP: Final = "  "
MIN_WIDTH: Final = 60
MAX_WIDTH: Final = 120


def output_width() -> int:
    """Columns to write for: the terminal's (or COLUMNS), 100 when there is none, within bounds."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, MIN_WIDTH), MAX_WIDTH)


def table(headers: Sequence[str], rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """The rows under their headers; stacked, one value per line, when they are too wide."""
    if not rows:
        return []
    widths = [max(len(cell) for cell in column) for column in zip(headers, *rows, strict=True)]
    if sum(widths) + len(GAP) * (len(widths) - 1) > width:
        return _stacked(headers, rows)
    lines = [headers, ["-" * w for w in widths], *rows]
    return [_line(line, widths) for line in lines]


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    return GAP.join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()


def _stacked(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Each row as its first cell, then the others indented, each after its header."""
    label = max(len(header) for header in headers[1:])
    lines = []
    for first, *others in rows:
        lines.append(first)
        lines += [f"    {h:<{label}}  {cell}" for h, cell in zip(headers[1:], others, strict=True) if cell]
    return lines
