"""The undefined values that the effects table claims for Zen 5 are those that the ALU model gives."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emufuzz.arch.effects import (
    UNDEFINED_FLAGS,
    undefined_flags_exact,
    undefined_result_rule,
    undefined_results,
    undefined_values,
)
from emufuzz.arch.effects_words import FLAG_BITS
from emufuzz.arch.leaves import LEAVES, family_of
from emufuzz.emulator import eflags

NAMES = {"and": "and_", "or": "or_", "imul r,r/m,imm": "imul2"}
LEFT = {"rol", "rcl", "shl", "shld"}
# AAM, AAD and DAS are handlers, not ALU functions; MOV to and from CR and DR touches no flags.
ELSEWHERE = {"bcd", "system"}
WORD16 = st.integers(0, 0xFFFF)
TESTED = sorted(leaf for leaf in UNDEFINED_FLAGS if family_of(leaf) not in ELSEWHERE)


def parity(value):
    return not (value & 0xFF).bit_count() & 1


def run(leaf, size, a, b, count, flags):
    """(result, flags) of the leaf's ALU function; None after #DE."""
    mnemonic = LEAVES[leaf].mnemonic
    if mnemonic == "imul" and leaf == "0faf":
        mnemonic = "imul2"
    function = getattr(eflags, NAMES.get(mnemonic, mnemonic))
    if mnemonic in {"shld", "shrd"}:
        return function(size, a, b, count, flags)
    if family_of(leaf) == "shift":
        return function(size, a, count, flags)
    if mnemonic in {"div", "idiv"}:
        answer = function(size, a, 0, b, flags)
        return answer and answer[::2]
    answer = function(size, a, b, flags)
    return answer[0], answer[-1]


def last_bit(mnemonic, size, a, count):
    bits, masked = 8 * size, count & (63 if size == 8 else 31)
    return bool(a << masked >> bits & 1 if mnemonic in LEFT else a >> masked - 1 & 1)


def value_of(rule, flag, mnemonic, size, operands, result, after):
    """The value that a rule gives to a flag."""
    a, b, count = operands
    top, below = result >> 8 * size - 1 & 1, result >> 8 * size - 2 & 1
    if rule in {"0", "1"}:
        return rule == "1"
    if rule == "last_bit":
        return last_bit(mnemonic, size, a, count)
    if rule == "index_parity":
        return parity(result if b else 0)
    if rule == "double_of" and mnemonic == "shld":
        return bool(eflags.shl(size, a, count, 0)[1] & FLAG_BITS["OF"])
    if flag == "OF":
        if mnemonic == "sar":
            return False
        return top != (after & FLAG_BITS["CF"] if mnemonic in LEFT else below)
    return {"SF": bool(top), "ZF": not result, "PF": parity(result)}[flag]


@pytest.mark.parametrize("leaf", TESTED)
@settings(max_examples=25)
@given(st.data())
def test_profile_values_agree_with_the_alu_model(leaf, data):
    row = LEAVES[leaf]
    sizes = (1,) if "ByteOp" in row.flags else (2, 4, 8)
    size = data.draw(st.sampled_from(sizes))
    word = st.integers(0, (1 << 8 * size) - 1)
    a, b, flags = data.draw(word), data.draw(word | st.just(0)), data.draw(st.integers(0, 0xFFF))
    count = 1 if row.src2 == "One" else data.draw(st.integers(0, 63))
    answer = run(leaf, size, a, b, count, flags)
    if answer is None:
        return
    result, after = answer
    undefined = undefined_flags_exact(leaf, size, count)
    for flag, rule in undefined_values(leaf).items():
        bit = FLAG_BITS[flag]
        if not undefined & bit:
            continue
        if rule == "preserved":
            assert after & bit == flags & bit, flag
            continue
        want = value_of(rule, flag, row.mnemonic, size, (a, b, count), result, after)
        assert bool(after & bit) == want, (flag, rule)


@settings(max_examples=200)
@given(st.sampled_from(["0fa4", "0fac", "0fbc", "0fbd"]), WORD16, WORD16, st.integers(17, 31))
def test_undefined_results_agree_with_the_alu_model(leaf, a, b, count):
    rule = undefined_result_rule(leaf)
    if rule == "preserved":
        assert undefined_results(leaf, 2, source=0)
        assert run(leaf, 2, a, 0, 0, 0)[0] == a
    else:
        assert rule == "rotate_source"
        assert undefined_results(leaf, 2, count=count)
        rotate = eflags.rol if LEAVES[leaf].mnemonic == "shld" else eflags.ror
        assert run(leaf, 2, a, b, count, 0)[0] == rotate(2, b, count - 16, 0)[0]
