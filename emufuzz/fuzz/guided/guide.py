"""The driver's side of guidance: takes candidates into the corpus, and makes each epoch's snapshot of it.

Everything here follows from results merged in the order of batches, so that it is the same whatever the
number of workers, and after a kill: what `merge` adds goes into the store with the batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec

from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.cells import Cell, CellCount, CellKey
from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.guided import epochs
from emufuzz.fuzz.guided.candidate import Candidate
from emufuzz.fuzz.guided.features import cell_feature
from emufuzz.fuzz.guided.generate import GuidedGenerator
from emufuzz.fuzz.guided.snapshot import Snapshot, empty

#: Cases that a corpus has at most; what is new then is known, but no case is kept for it.
MOST_ENTRIES: Final = 6000
#: Energy of a case in a cell that has no other, and what new arcs and verdicts add to it.
_RARE: Final = 16
_ARC: Final = 2
_MOST_ARCS: Final = 8
_JUDGED: Final = 8
#: A case that is no older than so many epochs counts twice.
_YOUNG: Final = 3


class Entry(msgspec.Struct, frozen=True):
    """A case of the corpus: where it was found, what was new about it, and the case, packed."""

    batch: int
    index: int
    cell: CellKey | None
    arcs: int
    judged: bool
    data: bytes


class Growth(msgspec.Struct):
    """What a batch added to the corpus.

    Attributes:
        batch: The batch.
        first: The number of the first new entry.
        entries: New entries.
        pieces: New pieces of their memory.
        features: New features.
        epoch: The epoch for which a snapshot was made; -1 for none.
        energies: Its energies.
    """

    batch: int
    first: int
    entries: list[Entry] = []
    pieces: dict[str, bytes] = {}
    features: list[int] = []
    epoch: int = -1
    energies: tuple[int, ...] = ()


class Kept(msgspec.Struct):
    """A corpus as the store has it: entries, pieces, feature -> batch, epoch -> energies."""

    entries: list[Entry] = []
    pieces: dict[str, bytes] = {}
    features: dict[int, int] = {}
    energies: dict[int, tuple[int, ...]] = {}


class Guide:
    """The corpus of a running campaign, and the snapshots that its batches work with."""

    def __init__(
        self,
        seed: int,
        options: Options,
        kept: Kept | None = None,
        cells: Mapping[Cell, CellCount] | None = None,
    ) -> None:
        """Begin, or go on with what is kept of an earlier run.

        Args:
            seed: The campaign's seed.
            options: What it generates.
            kept: The corpus that its file has.
            cells: The cells that it has been in.
        """
        self._seed = seed
        self._options = options
        self._corpus = kept or Kept()
        of_cells = {cell_feature(tuple(cell)): count for cell, count in (cells or {}).items()}
        self._cells = {feature: count.batch for feature, count in of_cells.items()}
        self._cases = {feature: count.cases for feature, count in of_cells.items()}
        self._snapshots: dict[int, Snapshot] = {}

    def __len__(self) -> int:
        return len(self._corpus.entries)

    @property
    def features(self) -> int:
        """How many features are known."""
        return len(self._corpus.features)

    def snapshot(self, epoch: int) -> Snapshot:
        """What an epoch's batches work with; that of the epoch's first merged batch must be made."""
        found = self._snapshots.get(epoch)
        if found is None:
            found = self._snapshots[epoch] = snapshot_of(self._corpus, self._cells, epoch)
            for old in [e for e in self._snapshots if e < epoch - epochs.LAG]:
                del self._snapshots[old]
        return found

    def generator(self, number: int) -> GuidedGenerator:
        """The generator of a batch."""
        snapshot = self.snapshot(epochs.epoch_of(number))
        return GuidedGenerator(self._seed, number, self._options, snapshot)

    def merge(self, result: BatchResult, *, whole: bool) -> Growth:
        """Take what a batch found; with its last case (`whole`) an epoch may end."""
        growth = Growth(result.number, len(self))
        for cell, tally in result.cells.items():
            feature = cell_feature(cell)
            self._cells.setdefault(feature, result.number)
            self._cases[feature] = self._cases.get(feature, 0) + tally.cases
        for candidate in result.candidates:
            self._take(result.number, candidate, growth)
        following = result.number + 1
        epoch = epochs.epoch_of(following)
        if whole and epoch and following == epochs.first_batch(epoch):
            growth.epoch, growth.energies = epoch + 1, self._energies(result.number)
            self._corpus.energies[growth.epoch] = growth.energies
        return growth

    def _take(self, batch: int, candidate: Candidate, growth: Growth) -> None:
        corpus = self._corpus
        new = [
            feature
            for feature in candidate.features
            if feature not in corpus.features and self._cells.get(feature, batch) >= batch
        ]
        if not new:
            return
        corpus.features.update(dict.fromkeys(new, batch))
        growth.features += new
        if len(self) >= MOST_ENTRIES:
            return
        packed = candidate.packed
        entry = Entry(batch, candidate.index, candidate.cell, candidate.arcs, candidate.judged, packed.data)
        corpus.entries.append(entry)
        growth.entries.append(entry)
        for name, piece in packed.pieces.items():
            if name not in corpus.pieces:
                corpus.pieces[name] = growth.pieces[name] = piece

    def _energies(self, merged: int) -> tuple[int, ...]:
        """How often each case is picked after batch `merged`: the rarer what it has, the more often."""
        young = epochs.first_batch(max(0, epochs.epoch_of(merged) - _YOUNG))
        return tuple([self._energy(entry, young=entry.batch >= young) for entry in self._corpus.entries])

    def _energy(self, entry: Entry, *, young: bool) -> int:
        """At least 1; the logarithm of how many cases the campaign had in its cell takes energy away.

        That its verdict was new counts while the case is young: later it is one of many.
        """
        energy = 1 + _ARC * min(entry.arcs, _MOST_ARCS) + _JUDGED * (entry.judged and young)
        if entry.cell is not None:
            cases = self._cases.get(cell_feature(entry.cell), 0)
            energy += max(0, _RARE - cases.bit_length())
        return energy * (1 + young)


def snapshot_of(corpus: Kept, cells: Mapping[int, int], epoch: int) -> Snapshot:
    """The state of a corpus that an epoch's batches work with; `cells` are cells' features -> batch."""
    if epoch < epochs.LAG:
        return empty(epoch)
    end = epochs.first_batch(epoch - epochs.LAG + 1)
    entries = [entry.data for entry in corpus.entries if entry.batch < end]
    energies = corpus.energies[epoch]
    known = frozenset(
        feature for features in (corpus.features, cells) for feature, batch in features.items() if batch < end
    )
    return Snapshot(epoch, entries, energies, dict(corpus.pieces), known)
