"""The ledger's vocabulary: what an oracle is known not to check, or to get wrong.

Each gap has a proof test that fails when the oracle no longer has it. A gap is asked about one case
at a time, when somebody disagrees with the oracle; its condition is as narrow as it can be stated,
so that a mistake elsewhere in the same instruction still shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

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


def find_gaps(gaps: Iterable[Gap], case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """(field, gap id) of every gap that a case falls into, in the order of the ledger."""
    instruction = CaseInstruction(case)
    return tuple((field, gap.id) for gap in gaps if gap.applies(instruction, outcome) for field in gap.fields)
