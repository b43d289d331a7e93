"""Taking away as much as possible, and numbers of few bits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emufuzz.fuzz.shrink.bits import smaller
from emufuzz.fuzz.shrink.reduce import reduced

MASK64 = (1 << 64) - 1


@given(st.integers(0, MASK64), st.integers(0, 64))
def test_what_is_needed_remains_in_its_order(needed, length):
    needed = {item for item in range(length) if needed >> item & 1}
    assert reduced(range(length), needed.issubset) == sorted(needed)


def test_nothing_is_left_where_nothing_is_needed_and_that_is_tried_first():
    tried = []
    assert reduced("abcdefgh", lambda rest: tried.append(rest) or True) == []
    assert tried == [[]]


def test_of_many_things_few_are_found_with_few_questions():
    asked = []

    def works(rest):
        asked.append(len(rest))
        return {100, 900} <= set(rest)

    assert reduced(range(1024), works) == [100, 900]
    assert len(asked) < 80


def test_what_does_not_work_is_never_the_answer():
    assert reduced([1, 2, 3], lambda _: False) == [1, 2, 3]


@pytest.mark.parametrize(("value", "default", "works", "simplest"), [
    (0xFFFF, 0,      lambda _: True,                   0),
    (0xFFFF, 0,      lambda n: n > 0,                  1),
    (0xFFFF, 0,      lambda n: n & 0x80,               0x80),
    (0xFFFF, 0x0F00, lambda n: n & 0x80,               0x0F80),
    (0xFFFF, 0,      lambda n: n > 0x9000,             0x9001),
    (1,      0,      lambda n: n == 1,                 1),
    (0,      0,      lambda _: False,                  0),
    (0x1234, 0x1234, lambda _: False,                  0x1234),
    (0xFFFF, 2,      lambda n: n & 1,                  3),  # RFLAGS keeps bit 1
])  # fmt: skip
def test_the_simplest_number(value, default, works, simplest):
    if simplest == 0x9001:  # several are as simple; it has to be a local optimum
        found = smaller(value, default, works)
        assert works(found)
        assert all(not works(found & ~(1 << bit)) for bit in range(16) if found >> bit & 1)
    else:
        assert smaller(value, default, works) == simplest


@given(st.integers(0, MASK64), st.integers(0, MASK64), st.integers(0, MASK64))
def test_a_number_that_works_gives_one_that_works_and_stays_as_it_is(value, default, mask):
    def works(number):
        return number & mask == value & mask

    found = smaller(value, default, works)
    assert works(found)
    assert found == default | 1 or (found ^ default) & ~(value ^ default) == 0
    assert smaller(found, default, works) == found
