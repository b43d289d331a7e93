"""What libFuzzer calls to change inputs: structure-aware mutation and crossover of the cases they encode.

Loads the emulator. A small share of changes is libFuzzer's own, of bytes: the codec makes a case of
anything, and comparisons that libFuzzer has seen go into these.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Final

import msgspec

from emufuzz.case.codec import decode_case, encode_case
from emufuzz.case.model import Case
from emufuzz.fuzz.mutate import Scope, crossover, mutate

#: One change in so many is libFuzzer's own.
_RAW: Final = 8
#: Tries to make a mutant that is not too long.
_ATTEMPTS: Final = 3

#: libFuzzer's change of bytes: (data, longest) -> data.
RawMutate = Callable[[bytes, int], bytes]


class Mutators:
    """Mutation and crossover for `atheris.Setup`; what they give depends on their arguments alone.

    Args:
        scope: What mutants may be.
        raw: libFuzzer's own mutation, `atheris.Mutate`.
    """

    def __init__(self, scope: Scope, raw: RawMutate) -> None:
        self._scope = scope
        self._raw = raw

    def mutate(self, data: bytes, longest: int, seed: int) -> bytes:
        """A mutant of an encoded case, of at most `longest` bytes."""
        rng = Random(seed)
        if not rng.randrange(_RAW):
            return self._raw(data, longest)[:longest]
        case = decode_case(data)
        mutant = self._first(longest, lambda: mutate(case, rng, self._scope))
        return mutant or self._raw(data, longest)[:longest]

    def crossover(self, one: bytes, other: bytes, longest: int, seed: int) -> bytes:
        """A case with something of both, of at most `longest` bytes; the first one if there is none."""
        rng = Random(seed)
        a, b = decode_case(one), decode_case(other)
        return self._first(longest, lambda: crossover(a, b, rng, self._scope)) or one[:longest]

    @staticmethod
    def _first(longest: int, make: Callable[[], Case]) -> bytes:
        """The first of a few cases that is not too long; empty if all are."""
        for _ in range(_ATTEMPTS):
            data = encode_case(msgspec.structs.replace(make(), id=""))
            if len(data) <= longest:
                return data
        return b""
