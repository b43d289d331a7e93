"""What every oracle offers: it says what each case should do, and what it does not vouch for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from emufuzz.arch.modes import MODES
from emufuzz.case.model import Case, Outcome

if TYPE_CHECKING:
    from emufuzz.oracle.gaps import Gap


class OracleUnavailableError(Exception):
    """The oracle cannot work here; the message gives the reason."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What an oracle can judge at all; `check` decides about the single case.

    Attributes:
        modes: CPU modes.
        cpls: Privilege levels, 0..3.
        physical: It takes `phys` cases and walks their page tables.
        devices: It takes cases with devices, and records the accesses.
        count: It takes `count` > 1.
        paths: It judges cases that enter KVM through a path.
        cost: Cheap oracles run on every case; dear ones on disagreements and on a sample.
        vendor: `intel` or `amd` if its undefined or vendor-dependent results are those of a real
            processor of this vendor, else the empty string.
    """

    modes: frozenset[str] = frozenset(MODES)
    cpls: frozenset[int] = frozenset({0, 1, 2, 3})
    physical: bool = False
    devices: bool = False
    count: bool = False
    paths: bool = False
    cost: str = "cheap"
    vendor: str = ""


class Oracle(Protocol):
    """A judge of outcomes. Its constructor raises OracleUnavailableError where it cannot work."""

    name: str

    @property
    def capabilities(self) -> Capabilities:
        """What it can judge at all."""

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """What it is known not to check, or to get wrong; () if it says so itself, case by case."""

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError (emufuzz.case.errors) if this oracle cannot take the case."""

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; the outcomes come in the same order.

        A case that kills or hangs the oracle gives an outcome with `crash` or `hang`.
        """

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
        """What this oracle does not vouch for in this case: (field or "all", gap id) pairs."""

    def fingerprint(self) -> dict[str, str]:
        """Name, version and configuration of what ran, for records."""

    def close(self) -> None:
        """Release engines and memory."""
