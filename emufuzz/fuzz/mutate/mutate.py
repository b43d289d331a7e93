"""A mutant: one to four changes, each of one dimension, drawn by their shares.

`mutate` changes anything. `vary_machine` and `vary_code` are its halves, for many mutants of
one machine.
"""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from random import Random
from typing import Final

from emufuzz.case.model import Case
from emufuzz.fuzz.mutate import (
    callbacks,
    descriptors,
    devices,
    instruction,
    mode,
    operands,
    path,
    sequence,
    tables,
)
from emufuzz.fuzz.mutate.base import Mutation, Scope, ScopedMutation, agreed, is_valid

#: Tries to make a valid mutant before only registers are changed, which is always valid.
_ATTEMPTS: Final = 6

# fmt: off
#: Dimension -> its changes with their shares, of those that depend on the case alone.
PLAIN: Final[dict[str, tuple[tuple[int, Mutation], ...]]] = {
    "instruction": (
        (6, instruction.new_instruction), (8, instruction.other_opcode), (8, instruction.other_prefixes),
        (6, instruction.other_modrm), (2, instruction.other_sib), (2, instruction.other_displacement),
        (6, instruction.other_immediate),
    ),
    "sequence":    ((4, sequence.other_sequence),),
    "operands":    (
        (10, operands.other_registers), (3, operands.copied_register), (4, operands.other_flags),
        (4, operands.small_count), (12, operands.aimed_operand), (3, operands.aimed_strings),
        (4, operands.aimed_stack), (6, operands.other_memory),
    ),
    "descriptors": (
        (4, descriptors.other_segment), (2, descriptors.other_code_segment), (1, descriptors.other_task),
        (1, descriptors.other_table), (4, descriptors.other_descriptor), (1, descriptors.other_gate),
    ),
    "tables":      ((10, tables.other_page_table),),
    "mode":        ((3, mode.other_control),),
    "path":        ((6, path.other_knobs),),
    "devices":     ((2, devices.other_stream), (6, devices.other_device), (2, devices.other_port)),
}
#: Those that the scope has a say in.
SCOPED: Final[tuple[tuple[int, ScopedMutation], ...]] = (
    (4, mode.other_mode), (6, path.other_path), (6, callbacks.other_callbacks),
)
# fmt: on


def _scoped(change: Mutation) -> ScopedMutation:
    """A change that any scope allows."""
    return lambda case, rng, _: change(case, rng)


def _placed(change: Mutation) -> Mutation:
    """A change of the instruction that mostly leaves its operand in memory where it was."""

    def changed(case: Case, rng: Random) -> Case | None:
        new = change(case, rng)
        return new if new is None or not rng.getrandbits(2) else operands.at_same_place(case, new)

    return changed


def _in(*names: str) -> list[tuple[int, Mutation]]:
    return [pair for name in names for pair in PLAIN[name]]


_CHANGES: Final = (
    *((share, _scoped(_placed(change))) for share, change in _in("instruction")),
    *((share, _scoped(change)) for share, change in _in(*(name for name in PLAIN if name != "instruction"))),
    *SCOPED,
)
_LIMITS: Final = tuple(accumulate(share for share, _ in _CHANGES))
#: Without memory: a new one costs the engines more than it shows.
_OF_CODE: Final = (
    *((share, _placed(change)) for share, change in _in("instruction")),
    *((share, change) for share, change in _in("operands") if change is not operands.other_memory),
)
_CODE_LIMITS: Final = tuple(accumulate(share for share, _ in _OF_CODE))
_OF_REGISTERS: Final[tuple[Mutation, ...]] = (
    operands.other_registers, operands.other_registers, operands.copied_register, operands.other_flags,
    operands.small_count, operands.aimed_operand,
)  # fmt: skip
_OF_MACHINE: Final = (
    *((share, _scoped(change)) for share, change in _in("descriptors", "tables", "mode", "path", "devices")),
    (4, _scoped(operands.other_memory)),
    *SCOPED,
)
_MACHINE_LIMITS: Final = tuple(accumulate(share for share, _ in _OF_MACHINE))
_ANY: Final = Scope()
#: How often a code or machine is changed twice.
_SECOND: Final = 0.4


def mutate(case: Case, rng: Random, scope: Scope = _ANY) -> Case:
    """A case like this one, with one to four changes; its id is the same.

    Args:
        case: The parent.
        rng: Decides everything.
        scope: The modes and paths that a mutant may have; the path stays as it is without any.
    """
    for _ in range(_ATTEMPTS):
        mutant = case
        for _ in range(1 + (rng.random() < 0.5) + 2 * (rng.random() < 0.15)):
            mutant = _changed(mutant, rng, scope)
        mutant = operands.tamed(mutant, rng)
        if mutant is not case and is_valid(mutant, case, scope):
            return agreed(mutant)
    return operands.tamed(operands.other_registers(case, rng), rng)


def vary_code(case: Case, rng: Random) -> Case:
    """The case with one or two changes of its code, registers and flags; all else is the same object."""
    for _ in range(1 + (rng.random() < _SECOND)):
        change = _OF_CODE[bisect_right(_CODE_LIMITS, rng.randrange(_CODE_LIMITS[-1]))][1]
        case = change(case, rng) or operands.other_registers(case, rng)
    return operands.tamed(case, rng)


def vary_registers(case: Case, rng: Random) -> Case:
    """The case with one change of its registers or flags."""
    change = _OF_REGISTERS[rng.randrange(len(_OF_REGISTERS))]
    return operands.tamed(change(case, rng) or operands.other_registers(case, rng), rng)


def vary_machine(case: Case, rng: Random, scope: Scope = _ANY) -> Case:
    """The case in a machine with one or two changes; the case itself if none of them is possible."""
    for _ in range(_ATTEMPTS):
        mutant = case
        for _ in range(1 + (rng.random() < _SECOND)):
            change = _OF_MACHINE[bisect_right(_MACHINE_LIMITS, rng.randrange(_MACHINE_LIMITS[-1]))][1]
            mutant = change(mutant, rng, scope) or mutant
        if mutant is not case and is_valid(mutant, case, scope):
            return agreed(mutant)
    return case


def _changed(case: Case, rng: Random, scope: Scope) -> Case:
    """One change that the case has something for."""
    while True:
        drawn = rng.randrange(_LIMITS[-1])
        change = _CHANGES[bisect_right(_LIMITS, drawn)][1]
        changed = change(case, rng, scope)
        if changed is not None:
            return changed
