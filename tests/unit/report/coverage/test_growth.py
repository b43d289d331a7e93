"""Growth of a campaign: what was reached by which case, and by which second."""

from __future__ import annotations

import itertools

import pytest

from emufuzz.fuzz.cells import Cell, CellCount
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.store.view import Merge
from emufuzz.report.coverage.growth import over_cases, over_time

LEAVES = ("00", "01", "02", "03", "04")


def cells_of(batches):
    """Those of a campaign that reached a new leaf at the start of each batch, until there are no more."""
    return {
        Cell(leaf, "real", 0, "ok", ""): CellCount(BATCH_SIZE, 0, 0, b"", batch)
        for batch, leaf in zip(range(batches), LEAVES, strict=False)
    }


def merges_of(times):
    return [
        Merge(number, 0, BATCH_SIZE, BATCH_SIZE * (number + 1), float(time))
        for number, time in enumerate(times)
    ]


def test_every_batch_is_a_moment_and_the_end_is_the_last():
    found = [(1, 7), (2, 0)]
    moments = list(over_time(cells_of(3), found, merges_of([1, 2, 4]), 5.0))
    assert moments == [
        (1.0, BATCH_SIZE, 1, 1, 0),
        (2.0, BATCH_SIZE * 2, 2, 2, 1),
        (4.0, BATCH_SIZE * 3, 3, 3, 2),
        (5.0, BATCH_SIZE * 3, 3, 3, 2),
    ]


def test_parts_of_a_batch_count_what_is_in_them():
    cells = {
        Cell(leaf, "real", 0, "ok", ""): CellCount(1, 0, place, b"", 0)
        for place, leaf in ((0, "00"), (49, "01"), (50, "02"))
    }
    merges = [Merge(0, 0, 50, 50, 1.0), Merge(0, 50, 50, 100, 2.0)]
    assert [m.cells for m in over_time(cells, [], merges, 2.0)] == [2, 3]


def test_a_long_campaign_has_a_bounded_number_of_moments():
    merges = merges_of([0.37 * (number + 1) for number in range(5000)])
    moments = list(over_time(cells_of(5000), [], merges, 1850.0))
    assert 119 <= len(moments) <= 121
    assert moments[-1][:2] == (1850.0, BATCH_SIZE * 5000)
    times = [moment.seconds for moment in moments]
    assert times == sorted(set(times))
    assert max(b - a for a, b in itertools.pairwise(times)) < 2 * 1850 / 120 + 0.37


@pytest.mark.parametrize("times", [[5, 3, 4], [0, 0, 0], [3, 2, 1e9]])
def test_times_that_a_file_has_in_no_order_never_go_back(times):
    moments = list(over_time(cells_of(3), [], merges_of(times), 2.0))
    assert [m.seconds for m in moments] == sorted(m.seconds for m in moments)
    assert moments[-1][1:] == (BATCH_SIZE * 3, 3, 3, 0)


def test_without_times_nothing_is_said_of_them():
    assert list(over_time(cells_of(3), [], [], 5.0)) == []


def test_over_the_cases_it_ends_with_all_of_them():
    points = list(over_cases(BATCH_SIZE * 3, cells_of(3), [(2, 5)]))
    assert len(points) <= 120
    assert points[-1] == (BATCH_SIZE * 3, 3, 3, 1)
    assert points[0].cells == 1
