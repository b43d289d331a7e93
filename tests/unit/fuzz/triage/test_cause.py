"""Findings of one cause, told across modes and encodings."""

from __future__ import annotations

import msgspec
import pytest
from support.stores import made_up

from emufuzz.fuzz.finding import FAILED
from emufuzz.fuzz.triage.cause import cause_of
from emufuzz.oracle.compare import Difference


def same(one, other):
    return cause_of(one).may_be(cause_of(other)) and cause_of(other).may_be(cause_of(one))


def of(mode, code, **more):
    return made_up(mode=mode, code=bytes.fromhex(code), **more)


@pytest.mark.parametrize(("one", "other", "expected"), [
    (("prot32", "11d8"),     ("compat32", "11d8"),   True),
    (("prot32", "11d8"),     ("prot16", "11d8"),     True),    # each in the size of its mode
    (("prot32", "6611d8"),   ("prot16", "11d8"),     True),    # 16 bits, chosen or not
    (("prot32", "6611d8"),   ("prot64", "11d8"),     False),   # 16 bits matter, and are not there
    (("prot64", "4811d8"),   ("prot32", "11d8"),     False),
    (("prot32", "11d8"),     ("prot32", "11c8"),     False),   # another register
    (("prot32", "8303 01"),  ("prot64", "8303 01"),  True),
    (("prot32", "8303 01"),  ("prot64", "8303 02"),  False),
    (("prot32", "1100"),     ("real", "1107"),       True),    # memory, however it is addressed
    (("prot32", "2e1100"),   ("prot32", "1100"),     False),   # a prefix that means the same everywhere
    (("prot32", "f01100"),   ("real", "f01107"),     True),
    (("prot32", "eb10"),     ("prot64", "eb10"),     True),
    (("prot32", "eb10"),     ("prot64", "eb12"),     False),
])  # fmt: skip
def test_instructions_are_compared_by_what_they_say(one, other, expected):
    assert same(of(*one), of(*other)) is expected


def differing(*differences, kind="gpr", verdict="alone"):
    return msgspec.structs.replace(made_up(kind=kind, verdict=verdict), differences=differences)


@pytest.mark.parametrize(("one", "other", "expected"), [
    (Difference("rax", "gpr", "0x1", "0x2"),   Difference("rax", "gpr", "0x5", "0x9"),   True),
    (Difference("rax", "gpr", "0x1", "0x2"),   Difference("rbx", "gpr", "0x1", "0x2"),   False),
    (Difference("rflags", "rflags", "-", "CF"), Difference("rflags", "rflags", "-", "ZF"), False),
    (Difference("rflags", "rflags", "-", "CF"), Difference("rflags", "rflags", "CF", "-"), True),
    (Difference("exception", "fault-missing", "none", "vector 13, error 0x8"),
     Difference("exception", "fault-missing", "none", "vector 13, error 0x10"),          True),
    (Difference("exception", "fault-missing", "none", "vector 13, error 0x8"),
     Difference("exception", "fault-missing", "none", "vector 12, error 0x8"),           False),
    (Difference("error code", "fault-error-code", "vector 14, error 0x2", "vector 14, error 0x6"),
     Difference("error code", "fault-error-code", "vector 14, error 0x3", "vector 14, error 0x7"), True),
    (Difference("error code", "fault-error-code", "vector 14, error 0x2", "vector 14, error 0x6"),
     Difference("error code", "fault-error-code", "vector 14, error 0x2", "vector 14, error 0x3"), False),
])  # fmt: skip
def test_differences_are_compared_without_the_values_of_the_case(one, other, expected):
    assert same(differing(one), differing(other)) is expected


def test_crashes_are_compared_by_what_was_raised():
    def crash(text):
        return differing(Difference("emulator", "crash", text, ""), kind="crash", verdict=FAILED)

    trace = "Traceback (most recent call last):\n  File x, line {}\nKeyError: {}"
    assert same(crash(trace.format(1, 0x10)), crash(trace.format(2, 0x20)))
    assert not same(crash(trace.format(1, 2)), crash("ValueError"))


def test_leaf_kind_verdict_and_vendor_are_part_of_the_cause():
    one = made_up()
    assert same(one, made_up(mode="compat32"))
    assert not same(one, made_up(leaf="13"))
    assert not same(one, made_up(kind="memory"))
    assert not same(one, made_up(verdict="split"))
    assert not same(one, made_up(vendor="amd"))
