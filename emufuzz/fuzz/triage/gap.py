"""Filter `known-gap`: gaps of the oracles explain the finding now."""

from __future__ import annotations

from emufuzz.fuzz.store.records import EXPLAINED
from emufuzz.fuzz.triage.base import Candidate, Context, Decision
from emufuzz.fuzz.triage.quirk import names_quirk
from emufuzz.oracle.compare import SKIPPED

#: What an oracle that fails over a case leaves as a reason; that is no entry of a ledger.
_FAILURES = ("-crash", "-hang")


def known_gap(candidate: Candidate, _context: Context) -> Decision | None:
    """Explained if entries of ledgers cover all differences, or all of what the oracles could say."""
    now = candidate.settled
    if now is None or now.refused or now.ruling.kind != SKIPPED:
        return None
    reason = now.ruling.reason
    if not reason or names_quirk(reason) or reason.endswith(_FAILURES):
        return None
    return Decision(EXPLAINED, reason)
