"""The recorded vectors through the forced-emulation path: nothing is left that no rule explains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from emufuzz.arch.leaves import FAMILIES
from emufuzz.subject.fep_rules import RULES
from emufuzz.subject.fep_vectors import FepCount, check_fep

VECTORS = Path(__file__).parents[1] / "data" / "vectors" / "kvm-6.12.jsonl.zst"
TOTAL = 63122

#: Rule -> vectors that it explains. A change of these numbers is a change of the model, not of the vectors.
EXPLAINED = {
    "code-breakpoint": 2,
    "prefix-seen": 24,
    "outs-once": 130,
    "decode-fault": 7386,
    "emulation-failure": 1054,
    "sysenter-msr": 9,
    "tsc-aux": 1,
    "msr-refused": 6,
    "msr-exists": 1,
    "vmware-pmc": 1,
    "lma-follows-pg": 1,
    "cpuid-bits": 4,
    "hypercall-bytes": 7,
    "accessed-bit": 1,
    "single-step": 668,
}


def ids(counts: Mapping[str, FepCount]) -> list[str]:
    return [name for count in counts.values() for name in count.ids]


def test_every_sixteenth_vector() -> None:
    counts = check_fep(VECTORS, frozenset(FAMILIES), step=16)
    assert ids(counts) == []
    assert sum(count.total for count in counts.values()) == (TOTAL + 15) // 16
    assert set(counts) == set(FAMILIES)
    assert sum(count.explained for count in counts.values()) < TOTAL / 16 / 6
    for count in counts.values():
        assert count.equal + count.explained == count.total


@pytest.mark.slow
def test_every_vector() -> None:
    counts = check_fep(VECTORS, frozenset(FAMILIES))
    assert ids(counts) == []
    assert sum(count.total for count in counts.values()) == TOTAL
    found = {rule: sum(count.rules[rule] for count in counts.values()) for rule in RULES}
    assert found == EXPLAINED
