"""Numbers at which carries, signs or limits change (pseudo-random, reproducible)."""

from __future__ import annotations

from random import Random


def boundary(rng: Random, bits: int) -> int:
    """A value of `bits` bits (8..64): mostly one at which carries, signs or limits change."""
    mask = (1 << bits) - 1
    kind = rng.randrange(10)
    if kind == 0:
        return rng.choice((0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0x100)) & mask
    if kind == 1:
        return -rng.choice((1, 2, 3, 8, 0x7F, 0x80, 0x81, 0x100)) & mask
    if kind == 2:
        return (1 << rng.randrange(bits)) & mask
    if kind == 3:
        return ((1 << rng.randrange(bits)) - 1) & mask
    if kind == 4:
        return -(1 << rng.randrange(bits)) & mask
    if kind == 5:
        width = rng.choice((8, 16, 32, 64))
        return rng.choice(((1 << width) - 1, 1 << (width - 1), (1 << (width - 1)) - 1)) & mask
    if kind == 6:
        return rng.getrandbits(8) * 0x0101010101010101 & mask
    if kind == 7:
        return rng.getrandbits(rng.randrange(1, bits + 1))
    return rng.getrandbits(bits)
