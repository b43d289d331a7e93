"""The ALU model against bit-by-bit models written from the SDM's pseudocode, and algebraic laws."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emufuzz.arch.rflags import EFLAGS_MASK
from emufuzz.emulator import eflags

CF, PF, AF, ZF, SF, OF = 0x001, 0x004, 0x010, 0x040, 0x080, 0x800
SIZES = (1, 2, 4, 8)


@st.composite
def values(draw, sizes=SIZES, operands=2):
    """(size, operands ..., EFLAGS word)."""
    size = draw(st.sampled_from(sizes))
    top = (1 << 8 * size) - 1
    edge = st.sampled_from([0, 1, 0xF, 0x10, top >> 1, (top >> 1) + 1, top - 1, top])
    operand = st.one_of(edge, st.integers(0, top))
    return (size, *(draw(operand) for _ in range(operands)), draw(st.integers(0, 0x3FFFFF)))


COUNTS = st.integers(0, 255)


def pick(word, bit):
    return word >> bit & 1


def of_result(bits, result):
    """SF, ZF, PF of a result."""
    parity = 0 if (result & 0xFF).bit_count() & 1 else PF
    return parity | (0 if result else ZF) | (SF if pick(result, bits - 1) else 0)


def ripple(bits, a, b, carry):
    """A full adder, bit by bit: (result, CF, AF, OF)."""
    result, carries = 0, [carry]
    for i in range(bits):
        total = pick(a, i) + pick(b, i) + carries[-1]
        result |= (total & 1) << i
        carries.append(total >> 1)
    return result, carries[-1], carries[4], carries[-1] ^ carries[-2]


def added(bits, a, b, carry, *, borrow=False):
    result, c, a4, o = ripple(bits, a, b, carry)
    c, a4 = (c ^ 1, a4 ^ 1) if borrow else (c, a4)
    return result, of_result(bits, result) | c * CF | a4 * AF | o * OF


def inverted(size, value):
    return value ^ (1 << 8 * size) - 1


def expected(flags, status):
    return flags & ~EFLAGS_MASK | status


@given(values())
def test_additions_are_a_full_adder(v):
    size, a, b, flags = v
    bits = 8 * size
    result, status = added(bits, a, b, 0)
    assert eflags.add(size, a, b, flags) == (result, expected(flags, status))
    assert eflags.xadd(size, a, b, flags) == (result, a, expected(flags, status))
    result, status = added(bits, a, b, flags & 1)
    assert eflags.adc(size, a, b, flags) == (result, expected(flags, status))


@given(values())
def test_subtractions_add_the_complement(v):
    size, a, b, flags = v
    bits = 8 * size
    result, status = added(bits, a, inverted(size, b), 1, borrow=True)
    assert eflags.sub(size, a, b, flags) == (result, expected(flags, status))
    assert eflags.cmp(size, a, b, flags) == (a, expected(flags, status))
    result, status = added(bits, a, inverted(size, b), 1 - (flags & 1), borrow=True)
    assert eflags.sbb(size, a, b, flags) == (result, expected(flags, status))


@given(values(operands=1))
def test_inc_dec_neg_not(v):
    size, a, flags = v
    bits = 8 * size
    result, status = added(bits, a, 1, 0)
    assert eflags.inc(size, a, flags) == (result, expected(flags, status & ~CF | flags & CF))
    result, status = added(bits, a, inverted(size, 1), 1, borrow=True)
    assert eflags.dec(size, a, flags) == (result, expected(flags, status & ~CF | flags & CF))
    result, status = added(bits, 0, inverted(size, a), 1, borrow=True)
    assert eflags.neg(size, a, flags) == (result, expected(flags, status))
    assert eflags.not_(size, a, flags) == (inverted(size, a), flags)


@given(values())
def test_logic_clears_of_cf_and_af(v):
    size, a, b, flags = v
    for function, result in ((eflags.and_, a & b), (eflags.or_, a | b), (eflags.xor, a ^ b)):
        assert function(size, a, b, flags) == (result, expected(flags, of_result(8 * size, result)))
    assert eflags.test(size, a, b, flags) == (a, expected(flags, of_result(8 * size, a & b)))


def step(name, bits, dst, carry, src):
    """One bit of a shift or rotate: (dst, CF, src); src feeds SHLD and SHRD."""
    top, mask = bits - 1, (1 << bits) - 1
    if name in {"rol", "rcl", "shl", "shld"}:
        out = pick(dst, top)
        into = {"rol": out, "rcl": carry, "shl": 0, "shld": pick(src, top)}[name]
        return dst << 1 & mask | into, out, (src << 1 | pick(src, top)) & mask
    out = pick(dst, 0)
    into = {"ror": out, "rcr": carry, "shr": 0, "sar": pick(dst, top), "shrd": pick(src, 0)}[name]
    return dst >> 1 | into << top, out, src >> 1 | pick(src, 0) << top


def shifted(name, size, dst, src, count, flags):
    """Shift bit by bit; flags by the SDM's formulas, taken beyond where they are defined."""
    bits, count = 8 * size, count & (63 if size == 8 else 31)
    if not count:
        return dst, flags
    carry, before = flags & 1, dst
    for i in range(count):
        lost = i >= bits and name in {"shld", "shrd"}  # what comes out was src's, and CF is 0
        dst, carry, src = step(name, bits, dst, carry, src)
        carry = 0 if lost else carry
    overflow = pick(dst, bits - 1) ^ (carry if name in {"rol", "rcl", "shl"} else pick(dst, bits - 2))
    if name == "shld":
        overflow = pick(before << count, bits) ^ pick(before << count, bits - 1)
    if name == "sar":
        overflow = 0
    if name[0] == "r":
        return dst, flags & ~(OF | CF) | overflow * OF | carry * CF
    return dst, expected(flags, of_result(bits, dst) | AF | overflow * OF | carry * CF)


@given(values(operands=1), COUNTS)
def test_shifts_and_rotates_go_bit_by_bit(v, count):
    size, a, flags = v
    for name in ("rol", "ror", "rcl", "rcr", "shl", "shr", "sar"):
        assert getattr(eflags, name)(size, a, count, flags) == shifted(name, size, a, 0, count, flags), name


@given(values(sizes=(2, 4, 8)), COUNTS)
def test_double_shifts_go_bit_by_bit(v, count):
    size, a, b, flags = v
    for name in ("shld", "shrd"):
        assert getattr(eflags, name)(size, a, b, count, flags) == shifted(name, size, a, b, count, flags), (
            name
        )


@given(values(operands=1), COUNTS)
def test_rotates_undo_each_other(v, count):
    size, a, flags = v
    result, after = eflags.rcl(size, a, count, flags)
    back, again = eflags.rcr(size, result, count, after)
    assert (back, again & CF) == (a, flags & CF)
    assert eflags.ror(size, eflags.rol(size, a, count, flags)[0], count, flags)[0] == a


def signed(size, value):
    return value - (1 << 8 * size) if pick(value, 8 * size - 1) else value


@given(values())
def test_multiplications(v):
    size, a, b, flags = v
    bits, mask = 8 * size, (1 << 8 * size) - 1
    low, high, after = eflags.mul(size, a, b, flags)
    assert high << bits | low == a * b
    assert after == flags & ~(OF | CF) | (OF | CF if high else 0)
    low, high, after = eflags.imul(size, a, b, flags)
    product = signed(size, a) * signed(size, b)
    assert (high << bits | low) == product & (1 << 2 * bits) - 1
    assert after == flags & ~(OF | CF) | (0 if signed(size, low) == product else OF | CF)
    assert eflags.imul2(size, a, b, flags) == (product & mask, after)


@given(values(operands=3))
def test_divisions(v):
    size, low, high, divisor, flags = v
    bits = 8 * size
    after = flags & ~(SF | ZF | PF) | AF
    answer = eflags.div(size, low, high, divisor, flags)
    if not divisor or (high << bits | low) // divisor >= 1 << bits:
        assert answer is None
    else:
        assert answer is not None
        quotient, remainder, got = answer
        assert quotient * divisor + remainder == high << bits | low
        assert remainder < divisor
        assert got == after


def fits(bits, dividend, by):
    """The quotient, truncated towards 0, is a signed number of `bits` bits."""
    quotient = abs(dividend) // abs(by) * (1 if (dividend < 0) == (by < 0) else -1)
    return -(1 << bits - 1) <= quotient < 1 << bits - 1


@given(values(operands=3), st.booleans())
def test_signed_divisions(v, small):
    size, low, high, divisor, flags = v
    bits = 8 * size
    if small:  # dividends of one word, which seldom overflow
        high = (1 << bits) - 1 if pick(low, bits - 1) else 0
    dividend = signed(size, high) << bits | low
    answer = eflags.idiv(size, low, high, divisor, flags)
    by = signed(size, divisor)
    if answer is None:
        assert not by or not fits(bits, dividend, by)
    else:
        quotient, remainder, after = answer
        assert signed(size, quotient) * by + signed(size, remainder) == dividend
        assert abs(signed(size, remainder)) < abs(by)
        assert not remainder or (signed(size, remainder) < 0) == (dividend < 0)
        assert after == flags & ~(SF | ZF | PF) | AF


@given(values(sizes=(2, 4, 8)))
def test_bit_tests(v):
    size, a, offset, flags = v
    bit = 1 << offset % (8 * size)
    after = flags & ~CF | (CF if a & bit else 0)
    assert eflags.bt(size, a, offset, flags) == (a, after)
    assert eflags.bts(size, a, offset, flags) == (a | bit, after)
    assert eflags.btr(size, a, offset, flags) == (a & ~bit, after)
    assert eflags.btc(size, a, offset, flags) == (a ^ bit, after)


@given(values(sizes=(2, 4, 8)))
def test_bit_scans(v):
    size, a, b, flags = v
    ones = [i for i in range(8 * size) if pick(b, i)]
    for function, index in ((eflags.bsf, min(ones, default=None)), (eflags.bsr, max(ones, default=None))):
        result, after = function(size, a, b, flags)
        assert result == (a if index is None else index)
        assert after & ZF == (0 if ones else ZF)
        assert after & ~EFLAGS_MASK == flags & ~EFLAGS_MASK


@given(values(), st.integers(0, 2**70))
def test_operands_count_modulo_their_width(v, surplus):
    size, a, b, flags = v
    wide_a, wide_b = a + (surplus << 8 * size), b + (surplus << 8 * size)
    for name in ("add", "adc", "sub", "sbb", "and_", "or_", "xor", "cmp", "test", "imul2", "mul", "imul"):
        function = getattr(eflags, name)
        assert function(size, wide_a, wide_b, flags) == function(size, a, b, flags), name
    for name in ("shl", "shr", "sar", "rol", "ror", "rcl", "rcr"):
        function = getattr(eflags, name)
        assert function(size, wide_a, 3, flags) == function(size, a, 3, flags), name


@given(st.integers(0, 0x3FFFFF), st.integers(0, 7))
def test_odd_conditions_negate_even_ones(flags, pair):
    assert eflags.test_cc(2 * pair, flags) != eflags.test_cc(2 * pair + 1, flags)


@given(values())
def test_conditions_order_numbers(v):
    size, a, b, flags = v
    after = eflags.cmp(size, a, b, flags)[1]
    assert eflags.test_cc(0x2, after) == (a < b)
    assert eflags.test_cc(0x4, after) == (a == b)
    assert eflags.test_cc(0x6, after) == (a <= b)
    assert eflags.test_cc(0xC, after) == (signed(size, a) < signed(size, b))
    assert eflags.test_cc(0xE, after) == (signed(size, a) <= signed(size, b))
