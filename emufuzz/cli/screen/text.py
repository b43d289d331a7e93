"""Numbers, durations and names for people to read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TextIO

#: Eight heights of a column, low to high; the second row is for terminals without them.
BARS: Final = "▁▂▃▄▅▆▇█"
ASCII_BARS: Final = "_.-:=+*#"


def bars_for(stream: TextIO) -> str:
    """The columns that a stream can show."""
    return BARS if (stream.encoding or "").lower().startswith("utf") else ASCII_BARS


def percent(part: float, whole: float) -> str:
    """A share with one decimal; `-` of nothing."""
    return f"{100 * part / whole:.1f} %" if whole else "-"


def mebibytes(size: int) -> str:
    """A size in MiB; `-` if it is not known."""
    return f"{size >> 20:,} MiB" if size else "-"


def number(value: int | None) -> str:
    """A count; `-` if it is not known."""
    return "-" if value is None else f"{value:,}"


def plural(count: int, what: str) -> str:
    """A count and what is counted."""
    return f"{count:,} {what}" if count == 1 else f"{count:,} {what}s"


def sparkline(values: Sequence[int], bars: str = BARS) -> str:
    """One column per value, the lowest and the highest value as the lowest and the highest column."""
    if not values:
        return ""
    low, high = min(values), max(values)
    top = len(bars) - 1
    return "".join(bars[(value - low) * top // (high - low) if high > low else 0] for value in values)
