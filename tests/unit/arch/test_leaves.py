from __future__ import annotations

from collections import Counter

import pytest

from emufuzz.arch import leaves
from emufuzz.arch.leaves import FAMILIES, LEAVES, family_of, leaf_rows, leaves_of


def test_every_row_has_its_own_id():
    assert len(leaf_rows()) == len(LEAVES) == 1241


def test_status_counts():
    assert Counter(row.status for row in leaf_rows()) == {
        leaves.STATUS_IMPL: 377,
        leaves.STATUS_SWITCH: 96,
        leaves.STATUS_DECODE_ONLY: 15,
        leaves.STATUS_UNDEFINED: 15,
        leaves.STATUS_NOTIMPL: 738,
    }


def test_every_leaf_is_in_exactly_one_family():
    listed = [leaf for family in FAMILIES for leaf in leaves_of(family)]
    assert len(listed) == len(set(listed)) == len(LEAVES)


def test_no_mnemonic_is_listed_twice_or_unused():
    named = [name for names in leaves._FAMILIES.values() for name in names]
    assert len(named) == len(set(named))
    assert set(named) == {row.mnemonic for row in leaf_rows() if row.mnemonic not in {"", "(undefined)"}}


@pytest.mark.parametrize(
    ("leaf", "family"),
    [
        ("00", "alu"), ("f7/2", "alu"), ("98", "alu"), ("8b", "mov"), ("8e", "segment"),
        ("0e", "stack"), ("d3/4", "shift"), ("0fa5", "shift"), ("6b", "muldiv"), ("0fba/4", "bits"),
        ("0f38f0.pfx_no.mem", "bits"), ("2f", "bcd"), ("0f8f", "branch"), ("a6", "string"),
        ("6c", "io"), ("fb", "flagop"), ("90", "xchg"), ("0fc1", "xchg"), ("cf", "farbranch"),
        ("0f01/7.mod3.rm=1", "system"), ("0f01/3.mod3.rm=0", "virt"), ("0f1e", "hint"),
        ("0fae/0.mem", "fpu"), ("0f28.pfx_66", "sse"), ("27", "notimpl"), ("ff/7", "undefined"),
    ],
)  # fmt: skip
def test_family_of(leaf, family):
    assert family_of(leaf) == family


def test_a_row_is_typed():
    row = LEAVES["0fc1"]
    assert row.opcode == 0xC1
    assert row.flags == {"ModRM", "Lock", "Fastop", "SrcWrite"}
    assert row.implemented
    assert not LEAVES["f1"].implemented


def test_unknown_leaf_and_family():
    with pytest.raises(KeyError):
        family_of("no such leaf")
    assert leaves_of("no such family") == ()
