"""The garbage collector of processes that run cases."""

from __future__ import annotations

import gc
import weakref

from emufuzz.fuzz.collector import rare_collections


class Knot:
    def __init__(self):
        self.me = self


def test_collections_are_rare_inside_and_as_they_were_behind():
    before, frozen = gc.get_threshold(), gc.get_freeze_count()
    with rare_collections():
        assert gc.get_threshold()[0] >= 10 * before[0]
        assert gc.get_freeze_count() > 10_000
    assert (gc.get_threshold(), gc.get_freeze_count()) == (before, frozen)


def test_cycles_that_cases_leave_are_still_collected():
    with rare_collections():
        first = weakref.ref(Knot())
        assert first() is not None
        for _ in range(200_000):
            if first() is None:
                break
            Knot()
        assert first() is None
