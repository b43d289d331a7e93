"""What each leaf does to the flags, and exactly what the SDM leaves undefined.

A comparison masks the flags that `undefined_flags_exact` gives and no others, and ignores a
destination only where `undefined_results` says so. The facts are in `effects_table`.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.effects_table import (
    RESULT_PROFILES,
    SIZE_16,
    SOURCE_ZERO,
    TEMPLATES,
    profile_words,
    references,
)
from emufuzz.arch.effects_words import (
    COUNT_ABOVE_1,
    COUNT_ABOVE_WIDTH,
    COUNT_FROM_WIDTH,
    NEVER,
    Effects,
    resolve,
)
from emufuzz.arch.leaves import LeafRow, leaf_rows

AMD_ZEN5: Final = "amd-zen5"

#: The worst case of all shift counts, whatever the operand size.
ANY_COUNT: Final = 0x3F

_REFERENCES: Final = references()

#: Implemented leaf -> its flag effects.
EFFECTS: Final[dict[str, Effects]] = {
    row.leaf: resolve(_REFERENCES[row.mnemonic], TEMPLATES) for row in leaf_rows() if row.implemented
}

_BYTE_LEAVES: Final = frozenset(row.leaf for row in leaf_rows() if "ByteOp" in row.flags)
_SHIFT_BY_ONE: Final = frozenset(row.leaf for row in leaf_rows() if row.src2 == "One")


def masked_count(op_size: int, count: int) -> int:
    """The shift count that the CPU uses: 6 bits with 8-byte operands, else 5 (SDM Vol. 2B SAL)."""
    return count & (0x3F if op_size == 8 else 0x1F)


def _holds(condition: str, op_size: int, count: int) -> bool:
    """Whether a condition on the masked count holds. All of them hold for higher counts as well."""
    masked = masked_count(op_size, count)
    if condition == COUNT_ABOVE_1:
        return masked > 1
    if condition == COUNT_FROM_WIDTH:
        return masked >= op_size * 8
    return condition == COUNT_ABOVE_WIDTH and masked > op_size * 8


def undefined_flags_exact(leaf: str, op_size: int, count: int = ANY_COUNT) -> int:
    """The RFLAGS bits that the SDM leaves undefined after this very instruction.

    Args:
        leaf: id of a leaf; one that is not implemented has no undefined flags.
        op_size: operand size in bytes (1, 2, 4, 8); byte instructions are known to have 1.
        count: the count before masking, of a shift or rotate that does not shift by a fixed 1.

    Returns:
        A subset of `undefined_flags(leaf)`.
    """
    effects = EFFECTS.get(leaf)
    if effects is None:
        return 0
    mask = effects.undefined
    if not effects.by_count:
        return mask
    if leaf in _SHIFT_BY_ONE:
        count = 1
    if leaf in _BYTE_LEAVES:
        op_size = 1
    if not masked_count(op_size, count):
        return 0
    for bits, condition in effects.conditional:
        if not _holds(condition, op_size, count):
            mask &= ~bits
    return mask


def _worst_case(row: LeafRow) -> int:
    return undefined_flags_exact(row.leaf, 2)


#: Leaf -> the RFLAGS bits that some operands leave undefined; leaves without any are absent.
UNDEFINED_FLAGS: Final = {row.leaf: mask for row in leaf_rows() if (mask := _worst_case(row))}


def undefined_flags(leaf: str) -> int:
    """The RFLAGS bits that the SDM leaves undefined for some operands of a leaf (0 if none)."""
    return UNDEFINED_FLAGS.get(leaf, 0)


def undefined_results(leaf: str, op_size: int, *, count: int = ANY_COUNT, source: int = 0) -> bool:
    """Whether the SDM leaves the destination operand undefined.

    That is SHLD and SHRD by more than the operand's width, BSF and BSR of 0, and 16-bit BSWAP.

    Args:
        leaf: id of a leaf.
        op_size: operand size in bytes.
        count: shift count before masking; by default the worst case.
        source: value of the source operand; by default the worst case, 0.
    """
    effects = EFFECTS.get(leaf)
    if effects is None or effects.undefined_result == NEVER:
        return False
    if effects.undefined_result == SIZE_16:
        return op_size == 2
    if effects.undefined_result == SOURCE_ZERO:
        return not source & (1 << 8 * op_size) - 1
    return _holds(effects.undefined_result, op_size, count)


def undefined_values(leaf: str, profile: str = AMD_ZEN5) -> dict[str, str]:
    """What a CPU profile puts into the undefined flags of a leaf: {flag name: rule of RULES}."""
    effects = EFFECTS.get(leaf)
    return profile_words(profile, effects.template) if effects and effects.undefined else {}


def undefined_result_rule(leaf: str, profile: str = AMD_ZEN5) -> str | None:
    """What a CPU profile puts into the undefined destination of a leaf: a rule of RULES, or None."""
    effects = EFFECTS.get(leaf)
    return RESULT_PROFILES[profile].get(effects.template) if effects else None
