"""Laws of the list of changed bytes: it is exact, maximal and in order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from emufuzz.case.model import PAGE_SIZE, _differing_runs

EDITS = st.lists(st.tuples(st.integers(0, PAGE_SIZE - 1), st.binary(min_size=1, max_size=300)), max_size=6)


@given(old=st.binary(min_size=8, max_size=8), edits=EDITS)
def test_runs_are_exactly_the_differing_bytes(old, edits):
    before = old * (PAGE_SIZE // 8)
    after = bytearray(before)
    for at, data in edits:
        after[at : at + len(data)] = data[: PAGE_SIZE - at]
    runs = list(_differing_runs(before, bytes(after)))
    covered = [i for start, end in runs for i in range(start, end)]
    assert covered == [i for i in range(PAGE_SIZE) if before[i] != after[i]]
    assert all(start < end for start, end in runs)
    assert all(runs[i][1] < runs[i + 1][0] for i in range(len(runs) - 1))
