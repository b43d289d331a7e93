"""Text for people: what may come from anybody, for a terminal; durations."""

from __future__ import annotations

from typing import Final

_MINUTE: Final = 60
_HOUR: Final = 60 * _MINUTE
_DAY: Final = 24 * _HOUR


def printable(text: str) -> str:
    """The text with every character that a terminal would not show, or act upon, as an escape.

    Control characters, line ends, marks that turn the direction of writing, and halves of surrogate pairs.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, behind the days if there are any."""
    whole = max(int(seconds), 0)
    days, rest = divmod(whole, _DAY)
    clock = f"{rest // _HOUR}:{rest % _HOUR // _MINUTE:02}:{rest % _MINUTE:02}"
    return f"{days} d {clock}" if days else clock


def span(seconds: float) -> str:
    """As `duration`, but below a minute in tenths of a second."""
    return f"{seconds:.1f} s" if seconds < _MINUTE else duration(seconds)
