"""Sequences: one to eight instructions in a row, of which the machine runs as many as it gets to."""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from emufuzz.case.model import Case
from emufuzz.fuzz.generate import HLT
from emufuzz.fuzz.mutate.base import INVALID_STATE, code_bits
from emufuzz.fuzz.mutate.instruction import any_plan, encoded, taken_apart

#: Instructions of a sequence, at most.
LONGEST: Final = 8


def may_be_several(case: Case) -> bool:
    """Whether a sequence means anything: not on most exit paths, which run one instruction."""
    return case.path is None or case.path == INVALID_STATE


def pieces(case: Case) -> list[bytes]:
    """The code of each instruction that is counted; what cannot be taken apart ends the list."""
    found: list[bytes] = []
    at = 0
    while len(found) < min(case.count, LONGEST):
        parts = taken_apart(case, at)
        if parts is None:
            break
        size = len(case.code) - at - len(parts[0].rest)
        found.append(case.code[at : at + size])
        at += size
    return found


def of_pieces(case: Case, parts: list[bytes]) -> Case | None:
    """The case with these instructions, HLT behind them; None if there are none, or too many."""
    if not 0 < len(parts) <= LONGEST:
        return None
    return msgspec.structs.replace(case, code=b"".join(parts) + HLT, count=len(parts))


def other_sequence(case: Case, rng: Random) -> Case | None:
    """An instruction more, one less, two exchanged, or one again."""
    if not may_be_several(case):
        return None
    parts = pieces(case)
    if not parts:
        return None
    place, bits = rng.randrange(len(parts)), code_bits(case)
    kind = rng.randrange(5)
    if kind < 2 or len(parts) == 1:
        for _ in range(1 + rng.getrandbits(1)):
            new = encoded(rng, bits, any_plan(rng, bits)).bytes()
            parts.insert(rng.randrange(len(parts) + 1), new)
    elif kind == 2:
        del parts[place]
    elif kind == 3:
        other = rng.randrange(len(parts))
        parts[place], parts[other] = parts[other], parts[place]
    else:
        parts.insert(place, parts[place])
    return of_pieces(case, parts)
