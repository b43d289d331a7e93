"""Bit tests and bit scans with Zen 5's flags (emulate.c: FASTOP2W; SDM Vol. 2A BT..BTS, BSF, BSR).

Conventions as in `eflags`. A bit offset counts modulo the operand's width; the part of a register
offset that reaches beyond it moves the address of a memory operand during decoding.
"""

from __future__ import annotations

from emufuzz.emulator.eflags_tables import BITS, KEEP, MASK, PARITY

_KEEP_ALL_BUT_CF = ~1


def bt(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """BT: (dst, CF = bit src of dst). OF SF AF PF, undefined, are preserved."""
    return dst & MASK[size], flags & _KEEP_ALL_BUT_CF | dst >> (src & (BITS[size] - 1)) & 1


def bts(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """BTS: (dst with bit src set, flags as BT)."""
    src &= BITS[size] - 1
    return (dst | 1 << src) & MASK[size], flags & _KEEP_ALL_BUT_CF | dst >> src & 1


def btr(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """BTR: (dst with bit src clear, flags as BT)."""
    src &= BITS[size] - 1
    return dst & ~(1 << src) & MASK[size], flags & _KEEP_ALL_BUT_CF | dst >> src & 1


def btc(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """BTC: (dst with bit src inverted, flags as BT)."""
    src &= BITS[size] - 1
    return (dst ^ 1 << src) & MASK[size], flags & _KEEP_ALL_BUT_CF | dst >> src & 1


def bsf(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """BSF: (index of src's lowest 1 bit, flags); (dst, flags) if src is 0, where AMD keeps dst.

    Of the undefined flags PF follows the index, OF SF AF CF are 0.
    """
    src &= MASK[size]
    if not src:
        return dst & MASK[size], flags & KEEP | 0x44
    index = (src & -src).bit_length() - 1
    return index, flags & KEEP | PARITY[index]


def bsr(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """BSR: (index of src's highest 1 bit, flags); otherwise as BSF."""
    src &= MASK[size]
    if not src:
        return dst & MASK[size], flags & KEEP | 0x44
    index = src.bit_length() - 1
    return index, flags & KEEP | PARITY[index]
