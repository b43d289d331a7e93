"""A small subset of sets that covers all that they cover together: greedy set cover.

The greedy choice needs at most 1 + ln(n) times as many sets as the best one, n being the size of the
largest set; nothing that runs in polynomial time does much better.
"""

from __future__ import annotations

import heapq
from collections.abc import Collection, Sequence
from typing import NamedTuple


class Chosen(NamedTuple):
    """A set of a cover.

    Attributes:
        place: Where it is among the candidates.
        new: The elements that it was chosen for: none of those chosen before it has them.
    """

    place: int
    new: frozenset[int]


def greedy_cover(candidates: Sequence[Collection[int]], costs: Sequence[int]) -> list[Chosen]:
    """Candidates that together have every element that any has, in the order of the choice.

    The one with the most elements that are new comes next; of several the one of least cost, then the
    first. Gains only shrink, so each is computed again only when it seems to be the largest.
    """
    missing: set[int] = set().union(*candidates)
    heap = [(-len(elements), costs[i], i) for i, elements in enumerate(candidates)]
    heapq.heapify(heap)
    chosen = []
    while missing:
        _, cost, index = heapq.heappop(heap)
        new = missing.intersection(candidates[index])
        if not new:
            continue
        entry = (-len(new), cost, index)
        if heap and heap[0] < entry:
            heapq.heappush(heap, entry)
            continue
        chosen.append(Chosen(index, frozenset(new)))
        missing -= new
    return chosen
