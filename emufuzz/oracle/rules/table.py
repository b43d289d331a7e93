"""All rules, and which of them are about an encoding."""

from __future__ import annotations

from functools import cache
from typing import Final, NamedTuple

from emufuzz.oracle.rules import (
    causes,
    control,
    delivery,
    effects,
    events,
    fetch,
    memory,
    preserved,
    privilege,
    segments,
    state,
    system,
    undefined,
)
from emufuzz.oracle.rules.decoded import Decoded, Shape
from emufuzz.oracle.rules.rule import ACCESS, ANY, COMPLETED, EVENTS, FAULT, FAULTED, UNCAUSED, Rule

#: Subject -> its rules; of exceptions that are due together the first one is named.
SUBJECTS: Final = {
    "fetch": fetch.RULES,
    "undefined": undefined.RULES,
    "privilege": privilege.RULES,
    "memory": memory.RULES,
    "system": system.RULES,
    "segments": segments.RULES,
    "control": control.RULES,
    "causes": causes.RULES,
    "state": state.RULES,
    "preserved": preserved.RULES,
    "effects": effects.RULES,
    "delivery": delivery.RULES,
    "events": events.RULES,
}
RULES: Final = tuple(rule for rules in SUBJECTS.values() for rule in rules)
BY_ID: Final = {rule.id: rule for rule in RULES}
_KEPT: Final = 65536


class Selected(NamedTuple):
    """The rules about one encoding, by kind; those of any outcome are in `completed` and `faulted`.

    FAULT rules are `early`,
    `access` (of phase ACCESS, none of which is due in a View.smooth state) and `late`.
    """

    early: tuple[Rule, ...]
    access: tuple[Rule, ...]
    late: tuple[Rule, ...]
    completed: tuple[Rule, ...]
    faulted: tuple[Rule, ...]
    uncaused: tuple[Rule, ...]
    events: tuple[Rule, ...]


@cache
def _candidates(mnemonic: int) -> tuple[Rule, ...]:
    return tuple(rule for rule in RULES if rule.mnemonics is None or mnemonic in rule.mnemonics)


_selected: Final[dict[Shape, Selected]] = {}


def rules_for(insn: Decoded) -> Selected:
    """The rules that select an encoding, the earliest faults first; remembered for each shape."""
    found = _selected.get(insn.shape)
    if found is None:
        if len(_selected) >= _KEPT:
            _selected.clear()
        found = _selected[insn.shape] = _select(insn)
    return found


def _select(insn: Decoded) -> Selected:
    rules = [rule for rule in _candidates(insn.mnemonic) if rule.encoding is None or rule.encoding(insn)]

    def of(*kinds: str) -> tuple[Rule, ...]:
        return tuple(rule for rule in rules if rule.kind in kinds)

    faults = sorted(of(FAULT), key=lambda rule: rule.phase)
    early = tuple(rule for rule in faults if rule.phase < ACCESS)
    access = tuple(rule for rule in faults if rule.phase == ACCESS)
    late = tuple(rule for rule in faults if rule.phase > ACCESS)
    return Selected(early, access, late, of(COMPLETED, ANY), of(FAULTED, ANY), of(UNCAUSED), of(EVENTS))
