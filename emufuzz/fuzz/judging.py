"""How much of what was tested the oracles have judged: per leaf and oracle, cases and a sample of fields."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.changed import Field, changed_fields
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import FINDING
from emufuzz.oracle.gaps import covers
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.stopping import oracle_at_stop

#: One case in so many has its fields counted, by its place in the batch: the gaps of a case cost more to
#: find out than the case itself.
SAMPLE: Final = 256
#: As the reason of a count: the oracle agrees, or it objects to a field for which it vouches.
AGREED: Final = ""
OBJECTS: Final = FINDING
#: As the gap of a field: the oracle vouches for it.
VOUCHES: Final = ""

_INS: Final = ("6c", "6d")
_NUMBER: Final = re.compile(r"0x[0-9a-f]+")

#: (oracle, leaf, why not) -> cases or fields.
Judged = dict[tuple[str, str, str], int]


def count_view(verdicts: Judged, oracle: str, leaf: str, reason: str) -> None:
    """Count what an oracle says of a case, without the numbers of this very case."""
    key = oracle, leaf, _NUMBER.sub("..", reason) if reason else reason
    verdicts[key] = verdicts.get(key, 0) + 1


def count_fields(
    fields: Judged, case: Case, subject: Outcome, answers: Sequence[tuple[Oracle, Outcome]]
) -> None:
    """Count the fields that changed in a case, per oracle: vouched for, or covered by a gap."""
    asked = [
        (oracle, at_stop(case, subject, outcome, oracle))
        for oracle, outcome in answers
        if not (outcome.crash or outcome.hang)
    ]
    changed = changed_fields(judge_case(case), subject, [outcome for _, outcome in asked])
    for oracle, outcome in asked:
        gaps = oracle.unchecked(case, outcome)
        for each in changed:
            key = oracle.name, subject.leaf, gap_of(gaps, each)
            fields[key] = fields.get(key, 0) + 1


def gap_of(unchecked: Iterable[tuple[str, str]], each: Field) -> str:
    """The first gap that covers a field; empty if none does."""
    return next((gap for name, gap in unchecked if covers(name, each.name)), VOUCHES)


def at_stop(case: Case, subject: Outcome, outcome: Outcome, oracle: Oracle) -> Outcome:
    """What an oracle says of the iterations that the subject did."""
    if outcome.crash or outcome.hang or (case.path is None and subject.leaf not in _INS):
        return outcome
    return oracle_at_stop(case, subject, outcome, oracle)
