"""What a worker tells of a case that may come into the corpus."""

from __future__ import annotations

import msgspec

from emufuzz.fuzz.cells import CellKey
from emufuzz.fuzz.guided.packed import Packed


class Candidate(msgspec.Struct, frozen=True):
    """A case that may come into the corpus.

    Attributes:
        index: Its place in the batch.
        features: What it reached that the snapshot does not know, in ascending order.
        arcs: How many of them are arcs.
        judged: Whether a verdict is among them.
        cell: Its cell if that is among them.
        packed: The case.
    """

    index: int
    features: tuple[int, ...]
    arcs: int
    judged: bool
    cell: CellKey | None
    packed: Packed
