"""What every oracle offers: it says what each case should do, and what it does not vouch for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from emufuzz.case.model import Case, Outcome


class OracleUnavailableError(Exception):
    """The oracle cannot work here; the message gives the reason."""


class Oracle(Protocol):
    """A judge of outcomes."""

    name: str

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError (emufuzz.case.errors) if this oracle cannot take the case."""

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; the outcomes come in the same order."""

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
        """What this oracle does not vouch for in this case: (field or "all", gap id) pairs."""

    def fingerprint(self) -> dict[str, str]:
        """Name, version and configuration of what ran, for records."""

    def close(self) -> None:
        """Release engines and memory."""
