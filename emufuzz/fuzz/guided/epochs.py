"""Epochs: runs of batches that work with one state of the corpus.

Batches of epoch e work with the corpus as it was when all batches up to epoch e - 2 were merged, so that
nobody waits for the last batch of the epoch before. The first epochs are short, since there is much to
learn; later ones long, since handing out a corpus costs something.
"""

from __future__ import annotations

from typing import Final

#: Batches of the first epochs; all later ones have LONG.
_FIRST: Final = (2, 2, 4, 4, 8, 8, 16, 16)
LONG: Final = 32
_GROWING: Final = sum(_FIRST)
#: How many epochs behind the corpus is.
LAG: Final = 2


def first_batch(epoch: int) -> int:
    """The number of an epoch's first batch."""
    if epoch < len(_FIRST):
        return sum(_FIRST[:epoch])
    return _GROWING + (epoch - len(_FIRST)) * LONG


def epoch_of(batch: int) -> int:
    """The epoch that a batch is in."""
    if batch >= _GROWING:
        return len(_FIRST) + (batch - _GROWING) // LONG
    return next(epoch for epoch in range(len(_FIRST)) if batch < first_batch(epoch + 1))


def allowed(merged: int) -> int:
    """The first batch that must not begin yet, when all batches below `merged` are merged."""
    return first_batch(epoch_of(merged) + LAG)
