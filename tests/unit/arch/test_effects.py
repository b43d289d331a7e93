"""The effects table per leaf, and its exact masks of undefined flags."""

from __future__ import annotations

import pytest

from emufuzz.arch.effects import (
    EFFECTS,
    UNDEFINED_FLAGS,
    undefined_flags,
    undefined_flags_exact,
    undefined_result_rule,
    undefined_results,
    undefined_values,
)
from emufuzz.arch.effects_table import references
from emufuzz.arch.leaves import leaf_rows
from emufuzz.arch.rflags import EFLAGS_MASK, flag_names


def mask_names(mask):
    return " ".join(flag_names(mask))


def test_every_implemented_leaf_has_an_entry_and_no_other_leaf():
    assert set(EFFECTS) == {row.leaf for row in leaf_rows() if row.implemented}


def test_every_mnemonic_of_the_table_exists():
    assert set(references()) == {row.mnemonic for row in leaf_rows() if row.implemented}


def test_an_unconditional_effect_excludes_the_others():
    for leaf, e in EFFECTS.items():
        conditional = sum(bits for bits, _ in e.conditional)
        always = e.undefined & ~conditional
        for mask, other in (
            (e.modified, e.cleared | e.set | always),
            (e.cleared, e.set | always),
            (e.set, always),
        ):
            assert not mask & other, leaf
        assert not e.undefined & ~EFLAGS_MASK, leaf


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("00", ""),
        ("20", "AF"),
        ("f7/4", "PF AF ZF SF"),
        ("f7/6", "CF PF AF ZF SF OF"),
        ("d1/2", ""),
        ("d3/2", "OF"),
        ("d1/4", "AF"),
        ("d3/5", "CF AF OF"),
        ("d3/7", "AF OF"),
        ("0fa5", "CF PF AF ZF SF OF"),
        ("0fa3", "PF AF SF OF"),
        ("0fbc", "CF PF AF SF OF"),
        ("d4", "CF AF OF"),
        ("2f", "OF"),
        ("0f20", "CF PF AF ZF SF OF"),
        ("0fc1", ""),
        ("0f0b", ""),
    ],
)
def test_worst_case(leaf, expected):
    assert mask_names(undefined_flags(leaf)) == expected


@pytest.mark.parametrize(
    ("leaf", "size", "count", "expected"),
    [
        ("c1/4", 4, 0, ""),
        ("c1/4", 4, 32, ""),
        ("c1/4", 8, 32, "AF OF"),
        ("c1/4", 4, 1, "AF"),
        ("c1/4", 4, 33, "AF"),
        ("c1/4", 4, 31, "AF OF"),
        ("c1/4", 2, 15, "AF OF"),
        ("c1/4", 2, 16, "CF AF OF"),
        ("c0/4", 4, 8, "CF AF OF"),
        ("c0/7", 1, 31, "AF OF"),
        ("d1/4", 4, 17, "AF"),
        ("d3/0", 8, 0x40, ""),
        ("d3/0", 4, 9, "OF"),
        ("d3/3", 2, 17, "OF"),
        ("0fa5", 2, 16, "AF OF"),
        ("0fa5", 2, 17, "CF PF AF ZF SF OF"),
        ("0fa5", 4, 17, "AF OF"),
        ("0fa5", 2, 32, ""),
        ("0fac", 8, 1, "AF"),
        ("f7/6", 4, 0, "CF PF AF ZF SF OF"),
        ("27", 1, 0, ""),
    ],
)
def test_exact(leaf, size, count, expected):
    assert mask_names(undefined_flags_exact(leaf, size, count)) == expected


@pytest.mark.parametrize("leaf", sorted(UNDEFINED_FLAGS))
def test_exact_masks_stay_within_the_worst_case_and_reach_it(leaf):
    union = 0
    for size in (1, 2, 4, 8):
        for count in range(256):
            exact = undefined_flags_exact(leaf, size, count)
            assert not exact & ~undefined_flags_exact(leaf, size)
            union |= exact
    assert union == undefined_flags(leaf)


@pytest.mark.parametrize(
    ("leaf", "size", "facts", "expected"),
    [
        ("0fa5", 2, {"count": 16}, False),
        ("0fa5", 2, {"count": 17}, True),
        ("0fac", 2, {"count": 0x30}, False),
        ("0fac", 2, {}, True),
        ("0fac", 4, {}, False),
        ("0fbc", 4, {"source": 0}, True),
        ("0fbd", 2, {"source": 0x10000}, True),
        ("0fbd", 4, {"source": 0x10000}, False),
        ("0fc8", 2, {}, True),
        ("0fc8", 4, {}, False),
        ("c1/4", 2, {"count": 31}, False),
        ("00", 4, {}, False),
        ("27", 1, {}, False),
    ],
)
def test_undefined_results(leaf, size, facts, expected):
    assert undefined_results(leaf, size, **facts) is expected


def test_profile_values_per_leaf():
    assert undefined_values("20") == {"AF": "0"}
    assert undefined_values("00") == {}
    assert undefined_values("27") == {}
    assert undefined_result_rule("0fbc") == "preserved"
    assert undefined_result_rule("00") is None
    assert undefined_result_rule("27") is None
