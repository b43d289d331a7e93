"""Filter `vendor`: processors differ there, and the subject does what some of them do.

Ledgers of the oracles say where vendors differ, and what the SDM leaves undefined. Such an entry takes
the field away from the oracle whose entry it is; it says nothing against another oracle that objects.
This filter weighs the entry against that objection.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from emufuzz.fuzz.store.records import EXPLAINED
from emufuzz.fuzz.triage.base import Candidate, Context, Decision
from emufuzz.fuzz.triage.judgement import Judgement
from emufuzz.oracle.compare import FINDING
from emufuzz.oracle.gaps import covers
from emufuzz.oracle.verdict import Opinion

#: Entries of ledgers that say that vendors differ.
VENDOR_ENTRIES: Final = frozenset(
    (
        "bochs-compare-order",
        "bochs-movsxd-66",
        "bochs-rex-r-segment",
        "bochs-vendor",
        "native-rep-loop",
        "native-vendor-call-order",
        "native-vendor-canonical",
        "native-vendor-near-branch",
        "native-vendor-push-segment",
        "unicorn-66-near-branch",
        "unicorn-far-pointer-rex-w",
    )
)
#: Entries of ledgers about what the SDM leaves undefined, or up to the processor.
UNDEFINED_ENTRIES: Final = frozenset(
    (
        "bochs-approximation",
        "bochs-undefined-flags",
        "native-undefined-flags",
        "unicorn-approximation",
        "unicorn-shld16-count",
        "unicorn-smsw32",
        "unicorn-undefined-before",
    )
)
#: The oracle that is a real processor, of one vendor.
PROCESSOR: Final = "native"


def vendor(candidate: Candidate, _context: Context) -> Decision | None:
    """Explained if vendors differ in all that differs, in both forms of the finding.

    Either an oracle has exactly what the subject has and its ledger says that vendors differ in it;
    or only the processor of this machine objects, to what a ledger says is undefined.
    """
    reasons = [
        "" if judgement is None else _reason(judgement)
        for judgement in (candidate.judgement, candidate.first_judgement)
    ]
    return Decision(EXPLAINED, reasons[0]) if all(reasons) else None


def _reason(judgement: Judgement) -> str:
    """Why a difference is one of vendors; empty if it is none."""
    if judgement.failed or judgement.ruling.kind != FINDING:
        return ""
    against = [opinion for opinion in judgement.opinions if opinion.verdict.kind == FINDING]
    fields = {difference.field for opinion in against for difference in opinion.verdict.differences}
    if not fields:
        return ""
    for opinion in judgement.opinions:
        if opinion.verdict.kind != FINDING and not fields & {d.field for d in opinion.verdict.differences}:
            entries = _entries(opinion, VENDOR_ENTRIES, fields)
            if entries:
                return f"{opinion.oracle} does the same; vendors differ: {'+'.join(entries)}"
    if [opinion.oracle for opinion in against] == [PROCESSOR]:
        for opinion in judgement.opinions:
            entries = _entries(opinion, UNDEFINED_ENTRIES, fields)
            if entries:
                return f"only {PROCESSOR} objects, to what is undefined: {'+'.join(entries)}"
    return ""


def _entries(opinion: Opinion, known: frozenset[str], fields: Iterable[str]) -> tuple[str, ...]:
    """The known entries of an oracle that cover all fields in this case; none if one is not covered."""
    found: dict[str, None] = {}
    for of in fields:
        entry = next((gap for field, gap in opinion.unchecked if gap in known and covers(field, of)), None)
        if entry is None:
            return ()
        found[entry] = None
    return tuple(sorted(found))
