"""Shifts and rotates with Zen 5's flags (emulate.c: FASTOP2CL, FASTOP3WCL).

Conventions as in `eflags`. `count` is the instruction's; the CPU masks it to 5 bits, 6 with 64-bit
operands (SDM Vol. 2B RCL/RCR/ROL/ROR, SAL/SAR/SHL/SHR, SHLD, SHRD). A masked count of 0 changes
nothing. Of what the SDM leaves undefined: OF follows its formula for count 1 at every count, shifts
set AF, CF and the result are what shifting bit by bit gives.
"""

from __future__ import annotations

from emufuzz.emulator.eflags_tables import BITS, COUNT, KEEP, KEEP_SZAP, MASK, PARITY, SIGN


def rol(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """ROL: CF = result bit 0, OF = MSB ^ CF."""
    count &= COUNT[size]
    mask = MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    bits = BITS[size]
    count &= bits - 1
    result = (dst << count | dst >> bits - count) & mask
    carry = result & 1
    flags = flags & KEEP_SZAP | carry
    return result, flags | 0x800 if result >> bits - 1 != carry else flags


def ror(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """ROR: CF = result's MSB, OF = MSB ^ the bit below."""
    count &= COUNT[size]
    mask = MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    bits = BITS[size]
    count &= bits - 1
    result = (dst >> count | dst << bits - count) & mask
    flags &= KEEP_SZAP
    top = result >> bits - 2  # MSB and the bit below
    if top & 2:
        flags |= 0x01
    return result, flags | 0x800 if 0 < top < 3 else flags


def rcl(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """RCL: dst and CF rotate together; OF = MSB ^ CF."""
    count &= COUNT[size]
    mask = MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    bits = BITS[size]
    count %= bits + 1
    wide = (flags & 1) << bits | dst
    wide = wide << count | wide >> bits + 1 - count
    result = wide & mask
    carry = wide >> bits & 1
    flags = flags & KEEP_SZAP | carry
    return result, flags | 0x800 if result >> bits - 1 != carry else flags


def rcr(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """RCR: dst and CF rotate together; OF = MSB ^ the bit below, of the result."""
    count &= COUNT[size]
    mask = MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    bits = BITS[size]
    count %= bits + 1
    wide = (flags & 1) << bits | dst
    wide = wide >> count | wide << bits + 1 - count
    result = wide & mask
    flags = flags & KEEP_SZAP | wide >> bits & 1
    return result, flags | 0x800 if 0 < result >> bits - 2 < 3 else flags


def shl(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """SHL: CF = last bit out (0 beyond the width), OF = MSB ^ CF; AF, undefined, is 1."""
    count &= COUNT[size]
    mask = MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    wide = dst << count
    result = wide & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | 0x10
    if not result:
        flags |= 0x40
    carry = wide & mask + 1
    if carry:
        flags |= 0x01
    if result & SIGN[size]:
        return result, flags | (0x80 if carry else 0x880)
    return result, flags | 0x800 if carry else flags


def shr(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """SHR: CF = last bit out (0 beyond the width), OF = MSB ^ the bit below of the result; AF is 1."""
    count &= COUNT[size]
    dst &= MASK[size]
    if not count:
        return dst, flags
    result = dst >> count
    flags = flags & KEEP | PARITY[result & 0xFF] | 0x10 | dst >> count - 1 & 1
    if not result:
        return 0, flags | 0x40
    return result, flags | 0x800 if result & SIGN[size] >> 1 else flags


def sar(size: int, dst: int, count: int, flags: int) -> tuple[int, int]:
    """SAR: CF = last bit out, OF = 0; AF, undefined, is 1."""
    count &= COUNT[size]
    mask, sign = MASK[size], SIGN[size]
    dst &= mask
    if not count:
        return dst, flags
    signed = (dst ^ sign) - sign
    result = signed >> count & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | 0x10 | signed >> count - 1 & 1
    if not result:
        return 0, flags | 0x40
    return result, flags | 0x80 if result & sign else flags


def shld(size: int, dst: int, src: int, count: int, flags: int) -> tuple[int, int]:
    """SHLD: the upper half of dst:src << count; CF and OF as SHL of dst; AF, undefined, is 1.

    A 16-bit count above 16, undefined, gives src rotated left by count - 16, CF = OF = 0.
    """
    count &= COUNT[size]
    bits, mask = BITS[size], MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    src &= mask
    shifted = dst << count
    if count <= bits:
        result = (shifted | src >> bits - count) & mask
    else:
        result = (src << count - bits | src >> 2 * bits - count) & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | 0x10
    if not result:
        flags |= 0x40
    elif result & SIGN[size]:
        flags |= 0x80
    carry = shifted & mask + 1
    if carry:
        flags |= 0x01
    return result, flags | 0x800 if bool(carry) != bool(shifted & SIGN[size]) else flags


def shrd(size: int, dst: int, src: int, count: int, flags: int) -> tuple[int, int]:
    """SHRD: the lower half of src:dst >> count; OF = MSB ^ the bit below; AF, undefined, is 1.

    A 16-bit count above 16, undefined, gives src rotated right by count - 16 and CF = 0.
    """
    count &= COUNT[size]
    bits, mask = BITS[size], MASK[size]
    dst &= mask
    if not count:
        return dst, flags
    src &= mask
    if count <= bits:
        result = (dst >> count | src << bits - count) & mask
    else:
        result = (src >> count - bits | src << 2 * bits - count) & mask
    flags = flags & KEEP | PARITY[result & 0xFF] | 0x10 | dst >> count - 1 & 1
    if not result:
        return 0, flags | 0x40
    if result & SIGN[size]:
        flags |= 0x80
    return result, flags | 0x800 if 0 < result >> bits - 2 < 3 else flags
