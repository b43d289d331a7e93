"""What every thing under test offers: run a batch of cases, give one outcome each, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from emufuzz.case.model import Case, Outcome


class Subject(Protocol):
    """A thing under test."""

    name: str

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if this subject cannot take the case."""

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; the outcomes come in the same order."""

    def fingerprint(self) -> dict[str, str]:
        """Name and version of what ran, for records."""


def close_subject(subject: Subject) -> None:
    """End what a subject holds outside of this process; most hold nothing."""
    close = getattr(subject, "close", None)
    if close is not None:
        close()
