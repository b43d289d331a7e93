"""Filter `marked`: another campaign has the finding, and there it is known."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from emufuzz.fuzz.store import StoreView
from emufuzz.fuzz.store.records import BUG, KNOWN
from emufuzz.fuzz.triage.base import Candidate, Context, Decision

#: Characters of another campaign's note that are repeated.
_LONGEST = 200


def marked(candidate: Candidate, context: Context) -> Decision | None:
    """Known if the same bucket is known, or a bug, in another campaign."""
    said = context.marks.get(candidate.name)
    return None if said is None else Decision(KNOWN, said)


def marks_of(directories: Iterable[Path]) -> dict[str, str]:
    """Name of a bucket -> who knows it, as what, and the note there; the first directory counts.

    Raises:
        StoreError: A directory is no campaign, or damaged.
    """
    marks: dict[str, str] = {}
    for directory in directories:
        view = StoreView(directory)
        try:
            rows = view.rows(
                "SELECT name, state, note FROM findings WHERE state IN (?, ?) ORDER BY batch, idx, name",
                (KNOWN, BUG),
            )
        finally:
            view.close()
        for name, state, note in rows:
            said = f"{state} in {directory}" + (f": {note[:_LONGEST]}" if note else "")
            marks.setdefault(name, said)
    return marks
