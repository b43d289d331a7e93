"""Python's cyclic garbage collector, for processes that run cases one after the other.

Almost nothing that a case makes has a cycle: reference counts free it. Looking for cycles every 700 new
objects, as Python does by itself, takes a thirtieth of a campaign's time.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: New objects between two collections of the young ones, and how many collections of each generation make
#: one of the next.
_THRESHOLD: Final = (50_000, 20, 20)


def collect_rarely() -> None:
    """Pass over all objects that there are in later collections, and collect the new ones rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLD)


@contextmanager
def rare_collections() -> Iterator[None]:
    """`collect_rarely`, until the block ends."""
    before = gc.get_threshold()
    collect_rarely()
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
