"""Which leaves of the opcode tables are legal in which modes, and which of them cases have reached."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Final, TypeAlias

from emufuzz.arch.leaves import leaf_rows
from emufuzz.arch.modes import MODES
from emufuzz.emulator.flags import No64, Prot
from emufuzz.fuzz.cells import CellKey
from emufuzz.fuzz.forms import Form, forms

#: (leaf, mode).
Pair: TypeAlias = tuple[str, str]

#: Modes in which leaves that need protected mode are #UD (SDM Vol. 2A LLDT, LTR, LAR and others).
_UNPROTECTED: Final = frozenset(("real", "vm86"))
_LONG: Final = "prot64"
#: Outcomes of cases that say nothing of their leaf: KVM was not entered, or emufuzz failed.
NOT_RUN: Final = frozenset(("no-exit", "crash", "hang"))


@cache
def legal_pairs() -> frozenset[Pair]:
    """Every implemented leaf in every mode in which the opcode tables allow it."""
    implemented = {row.leaf for row in leaf_rows() if row.implemented}
    return frozenset(
        (form.leaf, mode)
        for form in forms()
        for mode in MODES
        if form.leaf in implemented and _legal(form, mode)
    )


def _legal(form: Form, mode: str) -> bool:
    long = mode == _LONG
    if form.mode64 not in (None, long) or (long and form.d & No64):
        return False
    return not (mode in _UNPROTECTED and form.d & Prot)


def reached_pairs(cells: Iterable[CellKey]) -> frozenset[Pair]:
    """The legal pairs that are among cells."""
    return legal_pairs() & {(leaf, mode) for leaf, mode, _, outcome, _ in cells if outcome not in NOT_RUN}
