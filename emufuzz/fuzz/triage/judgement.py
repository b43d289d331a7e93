"""What the present code makes of a finding's case: subject, all oracles of the campaign, and their ruling."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.loop import skip_reason
from emufuzz.fuzz.panel import Panel
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import FINDING, SKIPPED
from emufuzz.oracle.verdict import Opinion, Ruling
from emufuzz.subject.base import Subject


class Judgement(NamedTuple):
    """What is said of one case now.

    Attributes:
        ruling: What all oracles say together.
        opinions: What each says that was asked.
        refused: Why the subject leaves nothing to compare; empty if it does not.
        failed: How the judging itself ended if it did not come to a ruling; else empty.
    """

    ruling: Ruling
    opinions: tuple[Opinion, ...] = ()
    refused: str = ""
    failed: str = ""

    @property
    def stands(self) -> bool:
        """Whether the case is a finding still, or nobody can say that it is not."""
        return bool(self.failed) or self.ruling.kind == FINDING


def failed(how: str) -> Judgement:
    """A judging that did not come to a ruling."""
    return Judgement(Ruling(FINDING), failed=how)


class Judge(Protocol):
    """Whoever runs cases again."""

    def judge(self, case: Case) -> Judgement:
        """What is said of a case; never raises for what the case does."""

    def close(self) -> None:
        """Release what it holds."""


class PanelJudge:
    """Subject and oracles in this process: a case that kills or hangs them takes it along."""

    def __init__(self, subject: Subject, first: Oracle, others: Sequence[Oracle] = ()) -> None:
        self._subject = subject
        self._first = first
        self._panel = Panel(first, others)

    def judge(self, case: Case) -> Judgement:
        """What is said of a case; what Python code raises is a failure."""
        try:
            return self._judge(case)
        except Exception:  # noqa: BLE001 - as in campaigns, whatever is raised is a result
            return failed(traceback.format_exc(limit=-6).strip())

    def _judge(self, case: Case) -> Judgement:
        self._subject.check(case)
        [outcome] = self._subject.run([case])
        if reason := skip_reason(outcome):
            return Judgement(Ruling(SKIPPED, reason), refused=reason)
        ruling, opinions = self._panel.judge(case, outcome, self._answer(case))
        return Judgement(ruling, tuple(opinions))

    def _answer(self, case: Case) -> Outcome | None:
        """What the first oracle says; None if it does not take the case."""
        try:
            self._first.check(case)
        except UnsupportedCaseError:
            return None
        return self._first.run([case])[0]

    def close(self) -> None:
        """Release the oracles."""
        self._panel.close()
        self._first.close()
