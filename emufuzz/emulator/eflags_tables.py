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


def _condition(code: int, flags: int) -> bool:
    """Condition code `code` (SDM Vol. 1 Appendix B Table B-1) under `flags`; odd codes negate."""
    below = bool(flags & X86_EFLAGS_CF)
    equal = bool(flags & X86_EFLAGS_ZF)
    less = bool(flags & X86_EFLAGS_SF) != bool(flags & X86_EFLAGS_OF)
    positive = (
        bool(flags & X86_EFLAGS_OF),
        below,
        equal,
        below or equal,
        bool(flags & X86_EFLAGS_SF),
        bool(flags & X86_EFLAGS_PF),
        less,
        less or equal,
    )[code >> 1]
    return positive != bool(code & 1)


#: Condition code (the low four bits of the opcode) -> answer by RFLAGS[11:0].
CONDITION: Final = tuple(tuple(_condition(code, flags) for flags in range(0x1000)) for code in range(16))
