"""The port equals the recorded emulator of Linux 6.12 in every vector, family by family."""

from __future__ import annotations

from pathlib import Path

import pytest

from emufuzz.arch.leaves import FAMILIES
from emufuzz.case.recorded import recorded_differences
from emufuzz.subject.vectors import FamilyCount, check_vectors, run_vectors

VECTORS = Path(__file__).parents[1] / "data" / "vectors" / "kvm-6.12.jsonl.zst"

#: Family -> its vectors. A change of these numbers is a change of the tables, not of the vectors.
TOTALS = {
    "alu": 11185,
    "mov": 2815,
    "stack": 2805,
    "shift": 5125,
    "muldiv": 1377,
    "bits": 3542,
    "bcd": 320,
    "branch": 3258,
    "string": 2805,
    "flagop": 1080,
    "xchg": 1325,
    "hint": 456,
    "farbranch": 3266,
    "segment": 3305,
    "system": 9179,
    "virt": 118,
    "io": 2665,
    "fpu": 485,
    "sse": 1375,
    "notimpl": 5376,
    "undefined": 1260,
}


@pytest.fixture(scope="module")
def counts() -> dict[str, FamilyCount]:
    return check_vectors(VECTORS, frozenset(FAMILIES))


def test_every_family_and_every_vector_is_counted(counts: dict[str, FamilyCount]) -> None:
    assert set(counts) == set(TOTALS) == set(FAMILIES)
    assert sum(count.total for count in counts.values()) == 63122


@pytest.mark.parametrize("family", FAMILIES)
def test_family_equals_the_recording(counts: dict[str, FamilyCount], family: str) -> None:
    count = counts[family]
    assert (count.ids[:5], dict(count.refused)) == ([], {})
    assert (count.equal, count.total) == (TOTALS[family], TOTALS[family])


def test_a_changed_recording_is_noticed() -> None:
    case, outcome, expected = next(run_vectors(VECTORS))
    assert recorded_differences(case, outcome, expected) == []
    assert recorded_differences(case, outcome, _with(expected, rflags=expected.rflags ^ 1)) == ["rflags"]
    assert recorded_differences(case, outcome, _with(expected, events=[("halt",)])) == ["events"]
    assert recorded_differences(case, outcome, _with(expected, length=9)) == ["length"]


def _with(outcome: object, **fields: object) -> object:
    import msgspec

    return msgspec.structs.replace(outcome, **fields)
