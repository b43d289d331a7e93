"""Guided batches: fresh cases of the structured generator, families of mutants, and crosses.

A family shares one machine (segments, tables, memory, devices), so that engines switch state seldom, as in
the structured generator's runs; its members differ in code and registers.
"""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Final

import msgspec

from emufuzz.case.arena import ARENA_BASE
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, code_address
from emufuzz.fuzz.environments import ARENA_SIZE, ARENA_SLOTS, SLOT_SIZE
from emufuzz.fuzz.generate import HLT, EvenGenerator, Options
from emufuzz.fuzz.guided.snapshot import Snapshot
from emufuzz.fuzz.kvm.generate import PathOptions, generator_of
from emufuzz.fuzz.mutate import Scope, crossover, vary_code, vary_machine
from emufuzz.fuzz.mutate.instruction import moved_code, taken_apart
from emufuzz.fuzz.mutate.sequence import may_be_several, other_sequence
from emufuzz.subject.kvm import KvmSubject

#: Cases of a family, and of a run of fresh cases.
FAMILY: Final = 32
#: Shares of families and of crosses; what is left is fresh.
_FAMILIES: Final = 0.34
_CROSSES: Final = 0.06
#: Of the families: with a machine of their own, and of sequences.
_MACHINES: Final = 0.4
_SEQUENCES: Final = 0.04


class GuidedGenerator:
    """One batch in the making; it depends on its arguments alone."""

    def __init__(self, seed: int, number: int, options: Options, snapshot: Snapshot) -> None:
        self._rng = Random(f"guided {seed} {number}")
        self._fresh = [generator_of(seed, number, options)]
        if not isinstance(options, PathOptions):
            self._fresh.append(EvenGenerator(seed, number, options))
        self._taken = [0, 0]
        self._snapshot = snapshot
        self._scope = Scope(options.modes, options.paths if isinstance(options, PathOptions) else ())
        self._prefix = f"s{seed}-b{number}-"
        self._slot = number * 991 % ARENA_SLOTS
        self._cases: list[Case] = []

    def cases(self, size: int) -> list[Case]:
        """The first `size` cases."""
        cases, rng, named = self._cases, self._rng, msgspec.structs.replace
        while len(cases) < size:
            group = self._group(rng.random())
            first = len(cases)
            cases += [named(case, id=f"{self._prefix}{i}") for i, case in enumerate(group, first)]
        return cases[:size]

    def leaf_of(self, index: int) -> str:
        """The leaf that the case at `index` seems to have."""
        found = taken_apart(self._cases[index])
        return found[1].leaf if found else ""

    def _group(self, roll: float) -> list[Case]:
        if not len(self._snapshot) or roll >= _FAMILIES + _CROSSES:
            return self._run()
        return self._family() if roll < _FAMILIES else self._crosses()

    def _run(self) -> list[Case]:
        """Fresh cases, on flat memory half of them with even shares of all forms."""
        which = self._rng.randrange(len(self._fresh))
        taken = self._taken[which]
        self._taken[which] += FAMILY
        return self._fresh[which].cases(taken + FAMILY)[taken:]

    def _family(self) -> list[Case]:
        rng = self._rng
        parent = self._snapshot.pick(rng)
        if rng.random() < _MACHINES:
            parent = self._with_machine(parent)
        if may_be_several(parent) and rng.random() < _SEQUENCES:
            return [
                self._placed(other_sequence(vary_code(parent, rng), rng) or parent) for _ in range(FAMILY)
            ]
        return [self._placed(vary_code(parent, rng)) for _ in range(FAMILY)]

    def _placed(self, case: Case) -> Case:
        """The case with its code in the arena's next slot, of which no engine has an older translation.

        Code at the end of its page stays there, and so does that of exit paths.
        """
        offset = code_address(case) - ARENA_BASE
        if case.path is not None or not 0 <= offset < ARENA_SIZE or not case.code.endswith(HLT):
            return case
        size = -len(case.code) // SLOT_SIZE * -1
        self._slot = (self._slot + size) % (ARENA_SLOTS - size)
        return moved_code(case, self._slot * SLOT_SIZE - offset)

    def _with_machine(self, parent: Case) -> Case:
        """The parent in another machine, if the subject takes that."""
        child = vary_machine(parent, self._rng, self._scope)
        return child if child.path is None or _is_taken(child) else parent

    def _crosses(self) -> list[Case]:
        """Crosses of one parent with others; those of exit paths share their machine."""
        rng, pick = self._rng, self._snapshot.pick
        parent = pick(rng)
        made = [crossover(parent, pick(rng), rng, self._scope) for _ in range(FAMILY)]
        taken = (case if case.extra is parent.extra or _is_taken(case) else parent for case in made)
        return [self._placed(case) for case in taken]


@cache
def _subject() -> KvmSubject:
    return KvmSubject()


def _is_taken(case: Case) -> bool:
    """Whether the model of KVM takes a machine that a change has made."""
    if case.path is None:
        return True
    try:
        _subject().check(case)
    except UnsupportedCaseError:
        return False
    return True
