"""Lookup tables of the ALU model: sizes, parity, conditions.

Indexed by operand size in bytes; the unused sizes hold 0. Tuples because an index into one costs
less than a shift that computes the same.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.rflags import (
    EFLAGS_MASK,
    X86_EFLAGS_CF,
    X86_EFLAGS_OF,
    X86_EFLAGS_PF,
    X86_EFLAGS_SF,
    X86_EFLAGS_ZF,
)

#: Operand size in bytes -> width in bits, all-ones mask, sign bit, mask of a shift count.
# fmt: off
SIZES: Final = (1, 2, 4, 8)
BITS: Final  = (0, 8,    16,     0, 32,          0, 0, 0, 64)
MASK: Final  = (0, 0xFF, 0xFFFF, 0, 0xFFFF_FFFF, 0, 0, 0, 0xFFFF_FFFF_FFFF_FFFF)
SIGN: Final  = (0, 0x80, 0x8000, 0, 0x8000_0000, 0, 0, 0, 0x8000_0000_0000_0000)
COUNT: Final = (0, 0x1F, 0x1F,   0, 0x1F,        0, 0, 0, 0x3F)
# fmt: on

#: Low byte of a result -> PF.
PARITY: Final = tuple(0 if i.bit_count() & 1 else X86_EFLAGS_PF for i in range(256))

#: Everything but the six status flags.
KEEP: Final = ~EFLAGS_MASK
#: Everything but OF, SF, ZF, AF, PF: INC and DEC leave CF alone.
KEEP_CF: Final = ~(EFLAGS_MASK & ~X86_EFLAGS_CF)
#: Everything but OF and CF: rotates and multiplications leave the others alone.
KEEP_SZAP: Final = ~(X86_EFLAGS_OF | X86_EFLAGS_CF)


_CONDITION_FLAGS = X86_EFLAGS_OF | X86_EFLAGS_SF | X86_EFLAGS_ZF | X86_EFLAGS_PF | X86_EFLAGS_CF


def _conditions(flags: int) -> tuple[bool, ...]:
    """The answers to condition codes 0..15 under `flags` (SDM Vol. 1 Appendix B Table B-1)."""
    overflow, sign = bool(flags & X86_EFLAGS_OF), bool(flags & X86_EFLAGS_SF)
    below, equal = bool(flags & X86_EFLAGS_CF), bool(flags & X86_EFLAGS_ZF)
    less = sign != overflow
    even = (overflow, below, equal, below or equal, sign, bool(flags & X86_EFLAGS_PF), less, less or equal)
    return tuple(answer for holds in even for answer in (holds, not holds))


def _condition_table() -> tuple[tuple[bool, ...], ...]:
    """_conditions by code, then by RFLAGS[11:0]; worked out once per combination of the five flags."""
    known: dict[int, tuple[bool, ...]] = {}
    by_flags = []
    for flags in range(0x1000):
        tested = flags & _CONDITION_FLAGS
        if tested not in known:
            known[tested] = _conditions(tested)
        by_flags.append(known[tested])
    return tuple(zip(*by_flags, strict=True))


#: Condition code (the low four bits of the opcode) -> answer by RFLAGS[11:0].
CONDITION: Final = _condition_table()
