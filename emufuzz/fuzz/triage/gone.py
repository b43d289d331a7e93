"""Filter `gone`: the present code does what the oracles say, or leaves nothing to compare."""

from __future__ import annotations

from emufuzz.fuzz.store.records import EXPLAINED
from emufuzz.fuzz.triage.base import Candidate, Context, Decision
from emufuzz.oracle.compare import AGREE


def gone(candidate: Candidate, _context: Context) -> Decision | None:
    """Explained if all agree now, or if the subject refuses the case, which campaigns do not count."""
    now = candidate.settled
    if now is None:
        return None
    if now.refused:
        return Decision(EXPLAINED, f"nothing to compare any more: {now.refused}")
    return Decision(EXPLAINED, "agrees now") if now.ruling.kind == AGREE else None
