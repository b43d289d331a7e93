"""Filter `known-quirk`: a departure of KVM that has a name explains the finding now."""

from __future__ import annotations

from emufuzz.fuzz.store.records import EXPLAINED
from emufuzz.fuzz.triage.base import Candidate, Context, Decision
from emufuzz.oracle.compare import SKIPPED

_QUIRK = "kvm-"


def names_quirk(reason: str) -> bool:
    """Whether a reason names a quirk, alone or beside gaps."""
    return any(part.startswith(_QUIRK) for part in reason.split("+"))


def known_quirk(candidate: Candidate, _context: Context) -> Decision | None:
    """Explained if a named quirk accounts for the differences, alone or together with gaps."""
    now = candidate.settled
    if now is None or now.refused or now.ruling.kind != SKIPPED or not names_quirk(now.ruling.reason):
        return None
    return Decision(EXPLAINED, now.ruling.reason)
