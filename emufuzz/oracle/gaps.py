"""The ledger's vocabulary: what an oracle is known not to check, or to get wrong.

Each gap has a proof test that fails when the oracle no longer has it. A gap is asked about one case
at a time, when somebody disagrees with the oracle; its condition is as narrow as it can be stated,
so that a mistake elsewhere in the same instruction still shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.instruction import CaseInstruction

Condition = Callable[[CaseInstruction, Outcome], bool]


@dataclass(frozen=True)
class Gap:
    """One known weakness of an oracle.

    Attributes:
        id: Name in reports.
        oracle: Name of the oracle.
        versions: Versions of it that have the gap.
        fields: Outcome fields that it does not vouch for; "all" for the whole outcome.
        reason: What happens, and what should.
        reference: Where the right behaviour is described.
        applies: Whether a case falls into it, given the oracle's outcome.
    """

    id: str
    oracle: str
    versions: str
    fields: tuple[str, ...]
    reason: str
    reference: str
    applies: Condition


def covers(field: str, of: str) -> bool:
    """Whether a gap about `field` is about a difference in `of`: the same, or a part of it."""
    return field in ("all", of) or of.startswith(field + ".") or (field == "gpr" and of in GPR_NAMES)


def vouches_for_nothing(outcome: Outcome) -> bool:
    """Whether an oracle takes the whole of its outcome back, as rules do that demand no exception."""
    return any(field == "all" for field, _ in outcome.unchecked)


def first_gaps(gaps: Iterable[Gap], case: Case, outcome: Outcome, fields: Iterable[str]) -> dict[str, str]:
    """Field -> id of the first gap of the ledger that covers it and that the case falls into.

    Conditions are asked only of gaps that could still cover a field.
    """
    open_fields = set(fields)
    found: dict[str, str] = {}
    instruction = CaseInstruction(case)
    for gap in gaps:
        covered = {of for of in open_fields if any(covers(field, of) for field in gap.fields)}
        if covered and gap.applies(instruction, outcome):
            found.update(dict.fromkeys(covered, gap.id))
            open_fields -= covered
            if not open_fields:
                break
    return found


def find_gaps(gaps: Iterable[Gap], case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """(field, gap id) of every gap that a case falls into, in the order of the ledger."""
    instruction = CaseInstruction(case)
    return tuple((field, gap.id) for gap in gaps if gap.applies(instruction, outcome) for field in gap.fields)
