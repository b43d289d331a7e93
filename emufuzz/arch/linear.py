"""Linear addresses (SDM Vol. 1 3.3.7.1)."""

from __future__ import annotations

from emufuzz.arch.cr import X86_CR4_LA57


def linear_bits(cr4: int) -> int:
    """How many bits of a linear address count: 57 with 5-level paging, else 48."""
    return 57 if cr4 & X86_CR4_LA57 else 48


def is_canonical(address: int, bits: int = 48) -> bool:
    """Whether the upper bits of a 64-bit address, from bit `bits` - 1 on, are equal."""
    return address >> bits - 1 in {0, (1 << 65 - bits) - 1}


def sign_extended(address: int, bits: int) -> int:
    """The canonical address whose low `bits` bits are those of `address`, as 64 bits."""
    sign = 1 << bits - 1
    return (address & (1 << bits) - 1 ^ sign) - sign & (1 << 64) - 1
