"""Boundary-biased values: registers, immediates, displacements (all pseudo-random, reproducible)."""

from __future__ import annotations

from random import Random

from emufuzz.case.values import boundary

MASK64 = 0xFFFFFFFFFFFFFFFF


def boundary_bytes(rng: Random, size: int) -> bytes:
    """`size` bytes (1..16), the low 8 of them a boundary value."""
    low = boundary(rng, min(size, 8) * 8).to_bytes(min(size, 8), "little")
    return low + rng.randbytes(size - len(low))


def pool(rng: Random, bits: int, count: int) -> list[int]:
    """`count` boundary values of `bits` bits."""
    return [boundary(rng, bits) for _ in range(count)]
