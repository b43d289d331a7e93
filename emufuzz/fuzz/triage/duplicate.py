"""Filter `duplicate`: an earlier finding has the same cause in another mode or on another path."""

from __future__ import annotations

from emufuzz.fuzz.store.records import DUPLICATE
from emufuzz.fuzz.triage.base import STANDING, Candidate, Context, Decision


def duplicate(candidate: Candidate, context: Context) -> Decision | None:
    """A duplicate of the lowest-numbered finding that stands and may have the same cause.

    Both have the same leaf, kind, verdict, differing fields and instruction (emufuzz.fuzz.triage.cause),
    and another place. What is a duplicate itself is no original.
    """
    place = candidate.finding.bucket.place
    for original in context.earlier:
        if original.state not in STANDING or original.finding.bucket.place == place:
            continue
        if original.cause.may_be(candidate.cause):
            return Decision(DUPLICATE, f"of {original.name}")
    return None
