"""Why a case could not be made smaller, in one line that was tried out."""

from __future__ import annotations

from typing import Final

from emufuzz.case.model import Case
from emufuzz.fuzz.shrink.fields import Key, differing_fields, field_name, with_defaults
from emufuzz.fuzz.shrink.probe import Probe

#: What a finding should come down to.
GOAL_FIELDS: Final = 5


def why_not_smaller(case: Case, probe: Probe) -> str:
    """Empty if there is one instruction and at most GOAL_FIELDS fields; else what each of them is for."""
    fields = differing_fields(case)
    reasons = []
    if case.count > 1:
        reasons.append(f"{case.count} instructions: with any fewer it is another finding or none")
    if len(fields) > GOAL_FIELDS:
        grouped: dict[str, list[str]] = {}
        for field in fields:
            grouped.setdefault(_without(case, field, probe), []).append(field_name(field))
        needed = "; ".join(f"{what} without {', '.join(names)}" for what, names in grouped.items())
        reasons.append(f"{len(fields)} fields: {needed}")
    return "; ".join(reasons)


def _without(case: Case, field: Key, probe: Probe) -> str:
    return probe.becomes(with_defaults(case, {field}))
