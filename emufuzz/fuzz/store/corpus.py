"""The corpus of a guided campaign in its file."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Annotated, Any, Final, TypeAlias

import msgspec
import zstandard

from emufuzz.case.errors import CaseError
from emufuzz.fuzz.cells import CellKey
from emufuzz.fuzz.guided.epochs import LAG, epoch_of, first_batch
from emufuzz.fuzz.guided.guide import Entry, Growth, Kept
from emufuzz.fuzz.guided.packed import MOST_BYTES, unpack
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.store.errors import StoreError
from emufuzz.fuzz.store.view import StoreView

Energy: TypeAlias = Annotated[int, msgspec.Meta(ge=1, le=1 << 32)]
_ENTRIES: Final = "SELECT id, batch, idx, cell, arcs, judged, data FROM corpus ORDER BY id"
#: Bytes of the energies of an epoch, at most.
_MOST_ENERGIES: Final = 1 << 20


def growth_changes(growth: Growth) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """The statements that add what a batch found."""
    for number, entry in enumerate(growth.entries, growth.first):
        cell = msgspec.json.encode(entry.cell).decode()
        values = (number, entry.batch, entry.index, cell, entry.arcs, int(entry.judged), _packed(entry.data))
        yield "INSERT INTO corpus VALUES(?, ?, ?, ?, ?, ?, ?)", values
    for name, piece in growth.pieces.items():
        yield "INSERT INTO pieces VALUES(?, ?)", (name, _packed(piece))
    batch = growth.batch
    for feature in growth.features:
        yield "INSERT INTO features VALUES(?, ?)", (feature, batch)
    if growth.epoch >= 0:
        energies = _packed(msgspec.msgpack.encode(growth.energies))
        yield "INSERT INTO epochs VALUES(?, ?)", (growth.epoch, energies)


def corpus_of(view: StoreView) -> Kept:
    """The corpus that a campaign's file has.

    Raises:
        StoreError: It is damaged.
    """
    kept = Kept()
    with view.errors():
        for number, *values in view.rows(_ENTRIES):
            if number != len(kept.entries):
                raise StoreError(f"{view.file}: damaged: case {len(kept.entries)} of the corpus is missing")
            kept.entries.append(_entry(view, *values))
        for name, data in view.rows("SELECT name, data FROM pieces"):
            kept.pieces[name] = _unpacked(view, data, MOST_BYTES)
        kept.features.update(view.rows("SELECT number, batch FROM features"))
        for epoch, data in view.rows("SELECT epoch, energies FROM epochs"):
            text = _unpacked(view, data, _MOST_ENERGIES)
            kept.energies[epoch] = msgspec.msgpack.decode(text, type=tuple[Energy, ...])
    _check(view, kept)
    return kept


def _check(view: StoreView, kept: Kept) -> None:
    """Every case is one, and every epoch that has begun, and the next, has the energies of its cases."""
    for number, entry in enumerate(kept.entries):
        try:
            unpack(entry.data, kept.pieces)
        except CaseError as error:
            raise StoreError(f"{view.file}: damaged: case {number} of the corpus: {error}") from error
    number, place = view.progress()
    begun = epoch_of(number + (place >= BATCH_SIZE))
    if sorted(kept.energies) != list(range(LAG, begun + LAG)):
        raise StoreError(f"{view.file}: damaged: the corpus lacks an epoch, or has one too many")
    batches = [entry.batch for entry in kept.entries]
    if batches != sorted(batches):
        raise StoreError(f"{view.file}: damaged: the cases of the corpus are in no order")
    for epoch, energies in kept.energies.items():
        if len(energies) != bisect_left(batches, first_batch(epoch - LAG + 1)):
            raise StoreError(f"{view.file}: damaged: the energies of epoch {epoch} belong to other cases")


def _entry(view: StoreView, batch: int, index: int, cell: str, arcs: int, judged: int, data: bytes) -> Entry:
    key = msgspec.json.decode(cell, type=CellKey | None)
    return Entry(batch, index, key, arcs, bool(judged), _unpacked(view, data, MOST_BYTES))


def _packed(data: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=3).compress(data)


def _unpacked(view: StoreView, data: bytes, most: int) -> bytes:
    """What was compressed, which has a bounded size whatever the file says."""
    try:
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=most, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise StoreError(f"{view.file}: damaged: a case of the corpus cannot be unpacked: {error}") from error
