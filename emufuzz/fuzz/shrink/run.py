"""Shrinking a finding: all passes in a fixed order, again and again, until none of them helps any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import Case
from emufuzz.fuzz.finding import Finding
from emufuzz.fuzz.shrink.code import fewer_instructions, fewer_prefixes, simpler_operands, without_rest
from emufuzz.fuzz.shrink.fields import differing_fields
from emufuzz.fuzz.shrink.machine import less_machine, shorter_scripts
from emufuzz.fuzz.shrink.memory import less_memory, without_paging
from emufuzz.fuzz.shrink.probe import Find, LimitError, Limits, Probe
from emufuzz.fuzz.shrink.reasons import why_not_smaller
from emufuzz.fuzz.shrink.segments import to_flat_segments
from emufuzz.fuzz.shrink.state import simpler_values, to_defaults, to_lower_privilege

#: A case, and who says whether another one is still the same finding; the simpler case.
Pass: TypeAlias = Callable[[Case, Probe], Case]

# fmt: off
PASSES: Final[tuple[tuple[str, Pass], ...]] = (
    ("instructions", fewer_instructions),
    ("rest of code", without_rest),
    ("segments",     to_flat_segments),
    ("defaults",     to_defaults),
    ("privilege",    to_lower_privilege),
    ("paging",       without_paging),
    ("prefixes",     fewer_prefixes),
    ("operands",     simpler_operands),
    ("memory",       less_memory),
    ("devices",      shorter_scripts),
    ("machine",      less_machine),
    ("values",       simpler_values),
)
# fmt: on

_HANG: Final = "hang"
DEFAULT_LIMITS: Final = Limits()


class PassLog(NamedTuple):
    """One run of one pass.

    Attributes:
        name: Of PASSES.
        tried: Cases that were run for it; those that had been run before cost nothing.
        kept: How many of them were simpler and still the same finding.
        fields_before, fields_after: Fields that did not have their default.
    """

    name: str
    tried: int
    kept: int
    fields_before: int
    fields_after: int


class Shrunk(NamedTuple):
    """What became of a finding.

    Attributes:
        finding: The same finding of a simpler case; where it is not one any more, the finding as it was.
        passes: What was tried, in order; runs that had nothing to try are left out.
        complete: Nothing more can be taken away: not so if a limit was met.
        reason: Why there is more left than one instruction and five fields, or why nothing was tried.
        found: The case still was the finding at the beginning.
        calls: How many cases were run.
    """

    finding: Finding
    passes: tuple[PassLog, ...] = ()
    complete: bool = True
    reason: str = ""
    found: bool = True
    calls: int = 0


def shrinking_to_obj(shrunk: Shrunk) -> dict[str, Any]:
    """What shrinking did as JSON values: its passes, whether it came to its end, and the reason."""
    passes = [log._asdict() for log in shrunk.passes]
    return {"passes": passes, "complete": shrunk.complete, "reason": shrunk.reason}


def shrink(finding: Finding, find: Find, limits: Limits = DEFAULT_LIMITS) -> Shrunk:
    """The simplest case that is still the same finding: of the same bucket, and failing likewise if it fails.

    The result depends on the finding, on `find` and on `limits.calls`; shrinking a complete result
    again changes nothing.

    Args:
        finding: What to shrink.
        find: What a case is a finding of; CampaignLoop.finding_of.
        limits: How long it may take.
    """
    if finding.kind == _HANG:
        return Shrunk(finding, complete=False, reason="a hang would hang again")
    probe = Probe(finding, find, limits)
    case = case_from_json(case_to_json(finding.case))
    passes: list[PassLog] = []
    try:
        if not probe.keeps(case):
            return Shrunk(finding, reason=f"the case is now {probe.becomes(case)}", found=False, calls=1)
        case = _to_fixed_point(case, probe, passes)
        reason = why_not_smaller(case, probe)
    except LimitError as limit:
        reason = str(limit)
    small = msgspec.structs.replace(probe.best, batch=finding.batch, index=finding.index)
    complete = not probe.exhausted
    return Shrunk(small, tuple(passes), complete, reason, calls=probe.calls)


def _to_fixed_point(case: Case, probe: Probe, passes: list[PassLog]) -> Case:
    changed = True
    while changed:
        before = case
        for name, simplify in PASSES:
            case = _run(name, simplify, case, probe, passes)
        changed = case != before
    return case


def _run(name: str, simplify: Pass, case: Case, probe: Probe, passes: list[PassLog]) -> Case:
    """One pass, logged also if a limit ends it."""
    calls, kept, fields = probe.calls, probe.kept, len(differing_fields(case))
    try:
        return simplify(case, probe)
    finally:
        if probe.calls > calls:
            after = len(differing_fields(probe.best.case))
            passes.append(PassLog(name, probe.calls - calls, probe.kept - kept, fields, after))
