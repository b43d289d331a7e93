"""Triage of a campaign: every finding through filters, in the order in which they were found."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from emufuzz.fuzz.store.marker import BY_HAND, StoreMarker
from emufuzz.fuzz.store.records import NEW
from emufuzz.fuzz.triage.base import Candidate, Context, Decision
from emufuzz.fuzz.triage.judgement import Judge
from emufuzz.fuzz.triage.loaded import load_all
from emufuzz.fuzz.triage.registry import FILTERS

_SEPARATOR: Final = ": "
#: Lines of a summary that say why.
_SHOWN: Final = 10


@dataclass(slots=True)
class Summary:
    """What triage did.

    Attributes:
        judged: Findings that were looked at.
        kept: Findings that people have marked.
        explained: (name, state, reason) of those that a filter explains.
        new: Names of all findings that are new afterwards.
    """

    judged: int = 0
    kept: int = 0
    explained: list[tuple[str, str, str]] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def by_filter(self) -> dict[str, int]:
        """Filter -> findings that it explains, in the order of FILTERS."""
        counts = Counter(filter_of(reason) for _, _, reason in self.explained)
        return {name: counts[name] for name in FILTERS if counts[name]}

    def lines(self, shown: int = _SHOWN) -> list[str]:
        """How many, and why; of the explained ones `shown` with their reasons."""
        counts = ", ".join(f"{count} {name}" for name, count in self.by_filter.items()) or "none explained"
        kept = f", {self.kept} marked by hand" if self.kept else ""
        lines = [f"triage: {self.judged} findings: {counts}; {len(self.new)} new{kept}"]
        lines += [f"  {name}: {reason}" for name, _, reason in self.explained[:shown]]
        more = len(self.explained) - shown
        return [*lines, f"  ... and {more} more"] if more > 0 else lines


def filter_of(reason: str) -> str:
    """The filter that gave a reason; empty if none did."""
    name, separator, _ = reason.partition(_SEPARATOR)
    return name if separator and name in FILTERS else ""


def triage(
    store: StoreMarker,
    filters: Sequence[str],
    judge: Judge,
    marks: Mapping[str, str] | None = None,
    *,
    again: bool = False,
) -> Summary:
    """Put findings into the states that filters say.

    What people have marked stays as it is. Reasons begin with the name of the filter.

    Args:
        store: The campaign.
        filters: Names of filters; the first that says something about a finding decides.
        judge: Who runs cases again, for filters that ask what the present code does.
        marks: From `marks_of`; without any the filter `marked` does nothing.
        again: Findings that these filters have explained before are judged again, and new if none of them
            explains them now; crashes and hangs are run again, too. Else only new findings are judged.

    Raises:
        StoreError: The campaign is damaged, or cannot be written.
        OracleUnavailableError: An oracle of the campaign cannot work here.
    """
    chosen = [name for name in filters if name != "marked" or marks]
    summary = Summary()
    context: list[Candidate] = []
    for loaded in load_all(store):
        candidate = Candidate(loaded, judge, replay_failed=again)
        record = loaded.record
        if record.reason == BY_HAND:
            summary.kept += 1
        elif record.state == NEW or (again and filter_of(record.reason) in chosen):
            summary.judged += 1
            decision = _decide(candidate, chosen, Context(context, marks or {}))
            _apply(store, candidate, decision, summary, record.reason)
        if candidate.state == NEW:
            summary.new.append(candidate.name)
        context.append(candidate)
    return summary


def _decide(candidate: Candidate, filters: Sequence[str], context: Context) -> Decision:
    """What the first filter says that says something; else the finding is new."""
    for name in filters:
        decision = FILTERS[name](candidate, context)
        if decision is not None:
            return Decision(decision.state, f"{name}{_SEPARATOR}{decision.reason}")
    return Decision(NEW, "")


def _apply(
    store: StoreMarker, candidate: Candidate, decision: Decision, summary: Summary, before: str
) -> None:
    """Keep a decision, unless somebody has marked the finding meanwhile."""
    if decision != (candidate.state, before) and not store.judged(candidate.name, *decision):
        summary.kept += 1
        candidate.state = store.record(candidate.name).state
        return
    candidate.state = decision.state
    if decision.state != NEW:
        summary.explained.append((candidate.name, *decision))
