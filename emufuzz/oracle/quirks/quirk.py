"""What a named departure of KVM is, and sets of leaves in which several of them occur."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from emufuzz.arch.leaves import leaf_rows
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.stand_in import StandIn
from emufuzz.oracle.table_operand import Elsewhere

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: Whether a rule explains all differences of (case, subject, oracle).
Explains = Callable[[Case, Outcome, Outcome, "Sequence[Difference]"], bool]


@dataclass(frozen=True, slots=True)
class Quirk:
    """One departure: what KVM does, what the hardware does, and where that is written.

    Attributes:
        id: Name in reports.
        leaves: Where it occurs; None if it does not matter which instruction it is.
        kvm: What KVM does.
        reference: Where the right behaviour is described.
        explains: The rule; None if only the instruction that stands in tells.
        paths: Exit paths on which it occurs; empty if it does not matter how the emulator is entered.
        instead: What KVM takes the instruction for (emufuzz.oracle.mistaken).
        elsewhere: The cases whose operands lie where KVM may look for them.
        of_exit: The rule gets the case with its path, and not what hardware executes natively.
    """

    id: str
    leaves: frozenset[str] | None
    kvm: str
    reference: str
    explains: Explains | None
    paths: frozenset[str] = frozenset()
    instead: StandIn | None = None
    elsewhere: Elsewhere | None = None
    of_exit: bool = False


#: What the emulator implements.
ANY: Final = frozenset(row.leaf for row in leaf_rows() if row.implemented)
#: String instructions.
STRINGS: Final = frozenset(row.leaf for row in leaf_rows() if "String" in row.flags)
#: Accesses to ports.
PORTS: Final = frozenset(("6c", "6d", "6e", "6f", "e4", "e5", "e6", "e7", "ec", "ed", "ee", "ef"))
#: Those of CPL 0 alone.
PRIVILEGED: Final = frozenset(row.leaf for row in leaf_rows() if "Priv" in row.flags)
#: What reads a destination in memory and writes to it.
READ_WRITE: Final = frozenset(
    row.leaf
    for row in leaf_rows()
    if row.implemented and row.dst in {"Mem", "Mem64"} and "Mov" not in row.flags
)
