"""Arithmetic and logic with the flags of the host that KVM runs on (emulate.c: FASTOP2, FASTOP1, test_cc).

KVM executes the guest's ALU instructions on the host, so a flag that the SDM leaves undefined
takes the host's value. These functions give the values of AMD Zen 5; `emufuzz.arch.effects` says
which flags those are. SDM Vol. 1 7.3 and the instructions' pages in Vol. 2.

All functions are pure. `size` is the operand size in bytes (1, 2, 4, 8), operands count modulo
2**(8 * size), `flags` is a whole EFLAGS word of which only OF SF ZF AF PF CF are read or changed.
A result is unsigned. They are written out, not composed: a campaign calls one per case.
"""

from __future__ import annotations

from emufuzz.emulator.eflags_bits import bsf, bsr, bt, btc, btr, bts
from emufuzz.emulator.eflags_muldiv import div, idiv, imul, imul2, mul
from emufuzz.emulator.eflags_shift import rcl, rcr, rol, ror, sar, shl, shld, shr, shrd
from emufuzz.emulator.eflags_tables import CONDITION, KEEP, KEEP_CF, MASK, PARITY, SIGN

__all__ = [
    "adc", "add", "and_", "bsf", "bsr", "bt", "btc", "btr", "bts", "cmp", "dec", "div", "idiv",
    "imul", "imul2", "inc", "mul", "neg", "not_", "or_", "rcl", "rcr", "rol", "ror", "sar", "sbb",
    "shl", "shld", "shr", "shrd", "sub", "test", "test_cc", "xadd", "xor",
]  # fmt: skip


def add(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """ADD: (dst + src, flags)."""
    mask = MASK[size]
    dst &= mask
    src &= mask
    total = dst + src
    result = total & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | (dst ^ src ^ result) & 0x10
    if total > mask:
        flags |= 0x01
    if not result:
        flags |= 0x40
    sign = SIGN[size]
    if result & sign:
        flags |= 0x80
    if (dst ^ result) & (src ^ result) & sign:
        flags |= 0x800
    return result, flags


def adc(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """ADC: (dst + src + CF, flags)."""
    mask = MASK[size]
    dst &= mask
    src &= mask
    total = dst + src + (flags & 1)
    result = total & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | (dst ^ src ^ result) & 0x10
    if total > mask:
        flags |= 0x01
    if not result:
        flags |= 0x40
    sign = SIGN[size]
    if result & sign:
        flags |= 0x80
    if (dst ^ result) & (src ^ result) & sign:
        flags |= 0x800
    return result, flags


def sub(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """SUB: (dst - src, flags)."""
    mask = MASK[size]
    dst &= mask
    src &= mask
    result = (dst - src) & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | (dst ^ src ^ result) & 0x10
    if dst < src:
        flags |= 0x01
    if not result:
        flags |= 0x40
    sign = SIGN[size]
    if result & sign:
        flags |= 0x80
    if (dst ^ src) & (dst ^ result) & sign:
        flags |= 0x800
    return result, flags


def sbb(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """SBB: (dst - src - CF, flags)."""
    mask = MASK[size]
    dst &= mask
    src &= mask
    total = dst - src - (flags & 1)
    result = total & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | (dst ^ src ^ result) & 0x10
    if total < 0:
        flags |= 0x01
    if not result:
        flags |= 0x40
    sign = SIGN[size]
    if result & sign:
        flags |= 0x80
    if (dst ^ src) & (dst ^ result) & sign:
        flags |= 0x800
    return result, flags


def cmp(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """CMP: (dst, flags of dst - src)."""
    return dst & MASK[size], sub(size, dst, src, flags)[1]


def and_(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """AND: (dst & src, flags). AF, undefined, is 0."""
    result = dst & src & MASK[size]
    flags = flags & KEEP | PARITY[result & 0xFF]
    if not result:
        return 0, flags | 0x40
    if result & SIGN[size]:
        return result, flags | 0x80
    return result, flags


def or_(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """OR: (dst | src, flags). AF, undefined, is 0."""
    result = (dst | src) & MASK[size]
    flags = flags & KEEP | PARITY[result & 0xFF]
    if not result:
        return 0, flags | 0x40
    if result & SIGN[size]:
        return result, flags | 0x80
    return result, flags


def xor(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """XOR: (dst ^ src, flags). AF, undefined, is 0."""
    result = (dst ^ src) & MASK[size]
    flags = flags & KEEP | PARITY[result & 0xFF]
    if not result:
        return 0, flags | 0x40
    if result & SIGN[size]:
        return result, flags | 0x80
    return result, flags


def test(size: int, dst: int, src: int, flags: int) -> tuple[int, int]:
    """TEST: (dst, flags of dst & src). AF, undefined, is 0."""
    return dst & MASK[size], and_(size, dst, src, flags)[1]


def inc(size: int, dst: int, flags: int) -> tuple[int, int]:
    """INC: (dst + 1, flags); CF stays."""
    result = (dst + 1) & MASK[size]
    flags = flags & KEEP_CF | PARITY[result & 0xFF]
    if not result & 0xF:
        flags |= 0x10
    if not result:
        return 0, flags | 0x40
    sign = SIGN[size]
    if result & sign:
        return result, flags | (0x880 if result == sign else 0x80)
    return result, flags


def dec(size: int, dst: int, flags: int) -> tuple[int, int]:
    """DEC: (dst - 1, flags); CF stays."""
    result = (dst - 1) & MASK[size]
    flags = flags & KEEP_CF | PARITY[result & 0xFF]
    if result & 0xF == 0xF:
        flags |= 0x10
    if not result:
        return 0, flags | 0x40
    sign = SIGN[size]
    if result & sign:
        return result, flags | 0x80
    return result, flags | (0x800 if result == sign - 1 else 0)


def neg(size: int, dst: int, flags: int) -> tuple[int, int]:
    """NEG: (-dst, flags); CF is 0 for 0 only."""
    result = -dst & MASK[size]
    if not result:
        return 0, flags & KEEP | 0x44
    flags = flags & KEEP | PARITY[result & 0xFF] | 0x01
    if result & 0xF:
        flags |= 0x10
    sign = SIGN[size]
    if result & sign:
        return result, flags | (0x880 if result == sign else 0x80)
    return result, flags


def not_(size: int, dst: int, flags: int) -> tuple[int, int]:
    """NOT: (~dst, flags unchanged)."""
    return ~dst & MASK[size], flags


def xadd(size: int, dst: int, src: int, flags: int) -> tuple[int, int, int]:
    """XADD: (new dst = dst + src, new src = old dst, flags of the addition)."""
    result, flags = add(size, dst, src, flags)
    return result, dst & MASK[size], flags


def test_cc(condition: int, flags: int) -> bool:
    """Whether condition code `condition` (its low four bits) holds under `flags` (SDM Vol. 1 B.1)."""
    return CONDITION[condition & 0xF][flags & 0xFFF]
