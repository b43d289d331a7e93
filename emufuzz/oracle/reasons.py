"""Why a case's differences are no finding: the quirks and gaps that account for all of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.exit_rules import beside_trap, forgets_trap, trapped
from emufuzz.oracle.gaps import covers, first_gaps
from emufuzz.oracle.machine_rules import is_walk
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.quirks import explaining_quirk

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_LOST_TRAP: Final = "kvm-lost-single-step"


def reason_for(
    case: Case, subject: Outcome, outcome: Outcome, differences: tuple[Difference, ...], oracle: Oracle
) -> str:
    """The quirks and gaps that account for every difference; empty if one is left.

    One quirk explains all, or what no gap covers; bits that walks set may have a quirk of their own.
    Quirks are those of a single instruction.
    """
    if case.count != 1:
        gaps, rest = _covering_gaps(differences, _gap_of(case, outcome, differences, oracle))
        return "" if rest else "+".join(gaps)
    quirk = explaining_quirk(case, subject, outcome, differences)
    if quirk:
        return quirk
    if behind := _behind_lost_trap(case, subject, outcome, differences, oracle):
        return behind
    gaps, rest = _covering_gaps(differences, _gap_of(case, outcome, differences, oracle))
    walks = tuple(d for d in rest if is_walk(case, d))
    others = tuple(d for d in rest if d not in walks)
    if rest == differences and not (walks and others):
        return ""  # as above
    quirks = [explaining_quirk(case, subject, outcome, part) for part in (others, walks) if part]
    return "" if None in quirks else "+".join((*filter(None, quirks), *gaps))


def _behind_lost_trap(
    case: Case, subject: Outcome, outcome: Outcome, differences: tuple[Difference, ...], oracle: Oracle
) -> str:
    """The reasons if KVM forgets a single-step trap, and gaps account for what differs beside it."""
    if case.path is None or not forgets_trap(case, subject, differences):
        return ""
    rest = beside_trap(case, subject, outcome)
    if not rest:
        return ""
    reason = reason_for(case, trapped(subject, outcome), outcome, rest, oracle)
    return reason and f"{_LOST_TRAP}+{reason}"


def _gap_of(
    case: Case, outcome: Outcome, differences: tuple[Difference, ...], oracle: Oracle
) -> dict[str, str]:
    """Field of a difference -> the gap that covers it; what a run itself has found ranks first."""
    fields = [difference.field for difference in differences]
    if not outcome.unchecked and oracle.ledger and case.count == 1:
        return first_gaps(oracle.ledger, judge_case(case), outcome, fields)
    unchecked = outcome.unchecked or oracle.unchecked(case, outcome)
    found = {}
    for of in fields:
        gap = next((gap for field, gap in unchecked if covers(field, of)), None)
        if gap is not None:
            found[of] = gap
    return found


def _covering_gaps(
    differences: tuple[Difference, ...], gap_of: dict[str, str]
) -> tuple[list[str], tuple[Difference, ...]]:
    """The gaps that cover differences, and those that none covers."""
    gaps = dict.fromkeys(gap_of[d.field] for d in differences if d.field in gap_of)
    return list(gaps), tuple(d for d in differences if d.field not in gap_of)
