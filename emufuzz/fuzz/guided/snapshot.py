"""The corpus as one epoch's batches see it: what workers are handed."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from random import Random

from emufuzz.case.model import Case
from emufuzz.fuzz.guided.packed import unpack


class Snapshot:
    """Cases to start from, what is known, and how often each case shall be picked.

    Attributes:
        epoch: The epoch whose batches work with it.
        entries: Packed cases, in the order in which they were found.
        energies: Shares in which they are picked, one per entry, each at least 1.
        pieces: The pieces of memory that they refer to.
        known: Features that somebody had.
    """

    def __init__(
        self,
        epoch: int,
        entries: Sequence[bytes],
        energies: Sequence[int],
        pieces: dict[str, bytes],
        known: frozenset[int],
    ) -> None:
        if len(entries) != len(energies):
            raise ValueError(f"{len(entries)} cases with {len(energies)} energies")
        self.epoch = epoch
        self.entries = tuple(entries)
        self.energies = tuple(energies)
        self.pieces = pieces
        self.known = known
        self._limits = list(accumulate(self.energies))
        self._cases: dict[int, Case] = {}

    def __len__(self) -> int:
        return len(self.entries)

    def __getstate__(self) -> tuple[object, ...]:
        return self.epoch, self.entries, self.energies, self.pieces, self.known

    def __setstate__(
        self, state: tuple[int, Sequence[bytes], Sequence[int], dict[str, bytes], frozenset[int]]
    ) -> None:
        Snapshot.__init__(self, *state)

    def pick(self, rng: Random) -> Case:
        """A case, by the energies; it is unpacked when it is first picked."""
        return self.case(bisect_right(self._limits, rng.randrange(self._limits[-1])))

    def case(self, number: int) -> Case:
        """The case of an entry.

        Raises:
            CaseError: It is damaged.
        """
        found = self._cases.get(number)
        if found is None:
            found = self._cases[number] = unpack(self.entries[number], self.pieces)
        return found


#: Before anything is known.
def empty(epoch: int) -> Snapshot:
    """The corpus of the first epochs, which is empty."""
    return Snapshot(epoch, (), (), {}, frozenset())
