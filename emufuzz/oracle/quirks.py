"""Where KVM's emulator knowingly departs from the hardware: named rules that recognise each.

The port keeps these on purpose. A rule names its leaves and checks the whole set of differences
against what exactly KVM does, so that another fault in the same instruction is still a finding.
Ids are `kvm-quirk-<name>`; a case that a rule explains is counted under that id.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from emufuzz.case.model import Case, Outcome

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference


@dataclass(frozen=True, slots=True)
class Quirk:
    """One departure: `leaves` None = any leaf; `reference` says what the hardware does and where."""

    id: str
    leaves: frozenset[str] | None
    reference: str
    explains: Callable[[Case, Outcome, Outcome, Sequence[Difference]], bool]


QUIRKS: Final[tuple[Quirk, ...]] = ()


def explaining_quirk(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> str | None:
    """The id of the first quirk that explains all differences, or None."""
    for quirk in QUIRKS:
        if quirk.leaves is not None and subject.leaf not in quirk.leaves:
            continue
        if quirk.explains(case, subject, oracle, differences):
            return quirk.id
    return None
