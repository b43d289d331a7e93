"""Whether a changed case is still the same finding: asked of `find`, within limits, once per case."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import Case
from emufuzz.fuzz.finding import FAILED, Finding

#: What a case is a finding of, None if of nothing.
Find: TypeAlias = Callable[[Case], Finding | None]

#: Seconds that may pass for each second that this process works: it may have to wait for the machine.
_PATIENCE: Final = 10
_NUMBER: Final = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(frozen=True, slots=True)
class Limits:
    """How long shrinking may take.

    Attributes:
        calls: Calls of `find`; results depend on it.
        seconds: A backstop, in processor time of this process, or ten times as much in all. A result that
            met it depends on how fast the machine is, and says so.
    """

    calls: int = 2000
    seconds: float = 60.0


class LimitError(Exception):
    """A limit was met; the message says which."""


class Probe:
    """Counts and remembers what `find` says.

    Attributes:
        calls: How often `find` was called.
        kept: How often it still was the same finding.
        best: The same finding as `find` said it last: that of the simplest case.
        exhausted: A limit was met.
    """

    def __init__(self, finding: Finding, find: Find, limits: Limits) -> None:
        self.calls = 0
        self.kept = 0
        self.best = finding
        self.exhausted = False
        self._same = signature(finding)
        self._find = find
        self._limits = limits
        self._ends = time.process_time() + limits.seconds, time.monotonic() + _PATIENCE * limits.seconds
        #: Case -> what it is if it is not this finding.
        self._others: dict[bytes, str] = {}

    def keeps(self, case: Case) -> bool:
        """Whether the case is still the finding that is being shrunk; if so it is the best one so far.

        Raises:
            LimitError: `find` may not be called any more.
        """
        text = case_to_json(case)
        if text in self._others:
            return False
        try:
            valid = case_from_json(text)
        except CaseError as error:
            self._others[text] = f"no valid case ({error})"
            return False
        self._count()
        found = self._find(valid)
        if found is not None and signature(found) == self._same:
            self.kept += 1
            self.best = found
            return True
        self._others[text] = _described(found, self._same)
        return False

    def becomes(self, case: Case) -> str:
        """What a case is that is not this finding; empty if it is. LimitError as from `keeps`."""
        return "" if self.keeps(case) else self._others[case_to_json(case)]

    def _count(self) -> None:
        self.exhausted = True
        if self.calls >= self._limits.calls:
            raise LimitError(f"incomplete: {self._limits.calls} calls were not enough")
        if time.process_time() >= self._ends[0] or time.monotonic() >= self._ends[1]:
            raise LimitError(f"incomplete: {self._limits.seconds:g} seconds were not enough")
        self.exhausted = False
        self.calls += 1


def _described(found: Finding | None, same: tuple[object, ...]) -> str:
    if found is None:
        return "no finding"
    return "another failure" if found.bucket == same[0] else found.bucket.name


def signature(finding: Finding) -> tuple[object, ...]:
    """What must stay: the bucket, and of a failure also who failed and how, without numbers."""
    if finding.verdict != FAILED or not finding.differences:
        return (finding.bucket,)
    difference = finding.differences[0]
    return finding.bucket, difference.field, _raised(difference.subject), _raised(difference.oracle)


def _raised(text: str) -> str:
    """The exception of a crash's text: its first line, or the last one of a traceback."""
    lines = text.strip().splitlines() or [""]
    return _NUMBER.sub("N", lines[-1 if lines[0].startswith("Traceback") else 0])
