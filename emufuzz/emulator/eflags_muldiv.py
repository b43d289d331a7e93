"""Multiplication and division with Zen 5's flags (emulate.c: FASTOP1SRC2, FASTOP1SRC2EX, FASTOP2W(imul)).

Conventions as in `eflags`. SDM Vol. 2A MUL, IMUL, DIV, IDIV. Products preserve the undefined SF ZF
AF PF; quotients preserve OF and CF, clear SF ZF PF and set AF, all of them undefined.
"""

from __future__ import annotations

from emufuzz.emulator.eflags_tables import BITS, KEEP_SZAP, MASK, SIGN

_KEEP_OF_CF = ~0xD4


def mul(size: int, lo: int, src: int, flags: int) -> tuple[int, int, int]:
    """MUL: (low half, high half, flags) of lo * src; CF = OF = the high half is not 0."""
    mask = MASK[size]
    product = (lo & mask) * (src & mask)
    high = product >> BITS[size]
    flags &= KEEP_SZAP
    return product & mask, high, flags | 0x801 if high else flags


def imul(size: int, lo: int, src: int, flags: int) -> tuple[int, int, int]:
    """One-operand IMUL: (low half, high half, flags); CF = OF = the low half alone is not the product."""
    mask, sign = MASK[size], SIGN[size]
    product = (((lo & mask) ^ sign) - sign) * (((src & mask) ^ sign) - sign)
    flags &= KEEP_SZAP
    if not -sign <= product < sign:
        flags |= 0x801
    return product & mask, product >> BITS[size] & mask, flags


def imul2(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """Two- and three-operand IMUL: (low half, flags as one-operand IMUL)."""
    mask, sign = MASK[size], SIGN[size]
    product = (((dst & mask) ^ sign) - sign) * (((src & mask) ^ sign) - sign)
    flags &= KEEP_SZAP
    if not -sign <= product < sign:
        flags |= 0x801
    return product & mask, flags


def div(size: int, lo: int, hi: int, src: int, flags: int) -> tuple[int, int, int] | None:
    """DIV: (quotient, remainder, flags) of hi:lo / src; None where the CPU raises #DE."""
    mask = MASK[size]
    src &= mask
    hi &= mask
    if hi >= src:
        return None
    quotient, remainder = divmod(hi << BITS[size] | lo & mask, src)
    return quotient, remainder, flags & _KEEP_OF_CF | 0x10


def idiv(size: int, lo: int, hi: int, src: int, flags: int) -> tuple[int, int, int] | None:
    """IDIV, which truncates towards 0: (quotient, remainder, flags); None where the CPU raises #DE."""
    mask, sign = MASK[size], SIGN[size]
    divisor = ((src & mask) ^ sign) - sign
    if not divisor:
        return None
    dividend = (((hi & mask) ^ sign) - sign) << BITS[size] | lo & mask
    quotient, remainder = divmod(abs(dividend), abs(divisor))
    if (dividend < 0) != (divisor < 0):
        quotient = -quotient
    if not -sign <= quotient < sign:
        return None
    if dividend < 0:
        remainder = -remainder
    return quotient & mask, remainder & mask, flags & _KEEP_OF_CF | 0x10
