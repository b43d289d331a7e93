"""Linear addresses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from emufuzz.arch.cr import X86_CR4_LA57
from emufuzz.arch.linear import is_canonical, linear_bits, sign_extended


def test_five_level_paging_has_57_bits():
    assert (linear_bits(0), linear_bits(X86_CR4_LA57)) == (48, 57)


@pytest.mark.parametrize("bits", [48, 57])
def test_the_edges_of_the_canonical_addresses(bits):
    half = 1 << bits - 1
    assert [is_canonical(a, bits) for a in (0, half - 1, half, (1 << 64) - half - 1, (1 << 64) - half)] == [
        True, True, False, False, True,
    ]  # fmt: skip


@given(st.integers(0, (1 << 64) - 1), st.sampled_from((48, 57)))
def test_an_extended_address_is_canonical_and_canonical_ones_stay(address, bits):
    extended = sign_extended(address, bits)
    assert is_canonical(extended, bits)
    assert not (extended ^ address) & (1 << bits) - 1
    assert (extended == address) == is_canonical(address, bits)
