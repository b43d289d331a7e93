"""Simpler numbers: the default, that with bit 0, or fewer bits that differ from the default."""

from __future__ import annotations

from collections.abc import Callable

from emufuzz.fuzz.shrink.reduce import reduced


def smaller(value: int, default: int, works: Callable[[int], bool]) -> int:
    """The simplest number that works, given that `value` does.

    The default is simplest, then come that with bit 0 (1 if the default is 0) and numbers of which few
    bits differ from the default. Bits that are always set, as bit 1 of RFLAGS, are in the default.
    """
    for simple in dict.fromkeys((default, default | 1)):
        if value == simple or works(simple):
            return simple
    differing = value ^ default
    bits = [1 << bit for bit in reversed(range(differing.bit_length())) if differing >> bit & 1]
    return default ^ sum(reduced(bits, lambda kept: bool(kept) and works(default ^ sum(kept))))
