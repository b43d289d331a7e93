"""Which leaves can be reached in which modes, and why a leaf was never reached."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from emufuzz.arch.leaves import LEAVES, LeafRow, leaf_rows
from emufuzz.arch.modes import MODES
from emufuzz.fuzz.forms import forms
from emufuzz.report.coverage.model import Coverage

PREFIX: Final = "the decoder takes the byte as a prefix or as the way into another map"
MODE64: Final = "exists only in 64-bit mode, which is not among the modes"
NOT_MODE64: Final = "does not exist in 64-bit mode, which is the only mode"
NO_HANDLER: Final = "KVM's tables have no handler for it, and no case has tried"
NO_CASE: Final = "no case has come to it"

#: In the order of reports.
REASONS: Final = (NO_CASE, MODE64, NOT_MODE64, NO_HANDLER, PREFIX)


class Never(NamedTuple):
    """A leaf that was never reached."""

    row: LeafRow
    reason: str


@cache
def modes_of(leaf: str) -> frozenset[str]:
    """The modes in which bytes can select a leaf; none for prefixes and escape bytes."""
    return _modes().get(leaf, frozenset())


@cache
def _modes() -> dict[str, frozenset[str]]:
    found: dict[str, frozenset[str]] = {}
    for form in forms():
        modes = frozenset(mode for mode in MODES if form.mode64 in (None, mode == "prot64"))
        found[form.leaf] = found.get(form.leaf, frozenset()) | modes
    return found


def why_never(row: LeafRow, modes: tuple[str, ...]) -> str:
    """Why no case has come to a leaf; one of REASONS."""
    possible = modes_of(row.leaf)
    if not possible:
        return PREFIX
    if not possible & set(modes):
        return MODE64 if "prot64" in possible else NOT_MODE64
    return NO_CASE if row.implemented else NO_HANDLER


def never_reached(coverage: Coverage) -> list[Never]:
    """All leaves that did not occur, in opcode order."""
    seen = coverage.leaves()
    return [Never(row, why_never(row, coverage.modes)) for row in leaf_rows() if row.leaf not in seen]


def leaf_share(coverage: Coverage) -> tuple[int, int]:
    """(implemented leaves that occurred, implemented leaves that can occur in the modes)."""
    possible = {
        row.leaf for row in LEAVES.values() if row.implemented and modes_of(row.leaf) & set(coverage.modes)
    }
    return len(possible & coverage.leaves()), len(possible)
