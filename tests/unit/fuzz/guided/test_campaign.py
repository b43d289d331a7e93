"""Guided campaigns: the same whatever the workers and wherever they stop; every case can be made again."""

from __future__ import annotations

import sqlite3

import pytest
import zstandard
from support.campaigns import found
from support.serial_pool import SerialPool

from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.examples import example_case
from emufuzz.fuzz.guided import epochs
from emufuzz.fuzz.guided.guide import Guide
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.store import Store, StoreError, StoreView
from emufuzz.fuzz.store.corpus import corpus_of

CONFIG = CampaignConfig(seed=9, generator="guided", modes=("real", "prot64"), bug="")
#: The first batch that works with a corpus, and some cases of the one after it.
CASES = (epochs.first_batch(epochs.LAG) + 1) * BATCH_SIZE + 700
TABLES = {
    "corpus": "SELECT * FROM corpus ORDER BY id",
    "pieces": "SELECT * FROM pieces ORDER BY name",
    "features": "SELECT * FROM features ORDER BY number",
    "epochs": "SELECT * FROM epochs ORDER BY epoch",
}


def run(directory, cases, workers=1, seed=0, config=CONFIG):
    """Run a campaign up to so many cases."""
    if (directory / "campaign.sqlite").exists():
        store = Store(directory)
        store.set_budget(cases)
    else:
        store = Store.create(directory, config, cases)
    try:
        store.begin("serial", {})
        pool = SerialPool(config.setup(), workers, seed)
        Campaign(config.setup(), Limits(cases), pool, store).run()
        return pool
    finally:
        store.close()


def packed(data):
    """Data of a corpus as SQLite writes it."""
    return zstandard.ZstdCompressor().compress(data).hex()


#: Well packed, but no case.
NO_CASE = "UPDATE corpus SET data = x'{}' WHERE id = 3".format(packed(b"{}"))  # noqa: S608 - a constant


def corpus(directory):
    with sqlite3.connect(directory / "campaign.sqlite") as db:
        return {table: db.execute(query).fetchall() for table, query in TABLES.items()}


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    directory = tmp_path_factory.mktemp("guided") / "out"
    pool = run(directory, CASES)
    assert pool.batches == sorted(pool.batches)
    assert pool.asked == 1  # one worker, one epoch with a corpus
    return directory


def test_a_corpus_grows_and_is_used(untouched):
    view = StoreView(untouched)
    kept = corpus_of(view)
    assert len(kept.entries) > 20
    assert sorted(kept.energies) == [2, 3]
    fresh = CampaignConfig(seed=9, modes=CONFIG.modes).setup()
    batch = epochs.first_batch(epochs.LAG)
    guided = Guide(9, fresh.options, kept, view.cells()).generator(batch).cases(BATCH_SIZE)
    view.close()
    of_sequences = [case for case in guided if case.count > 1]
    assert of_sequences
    assert {case.id for case in guided} == {f"s9-b{batch}-{i}" for i in range(BATCH_SIZE)}


def test_the_number_of_workers_changes_nothing(untouched, tmp_path):
    pool = run(tmp_path / "out", CASES, workers=3, seed=5)
    assert pool.batches != sorted(pool.batches)
    assert found(tmp_path / "out") == found(untouched)
    assert corpus(tmp_path / "out") == corpus(untouched)


def test_where_it_stops_changes_nothing(untouched, tmp_path):
    out = tmp_path / "out"
    for cases in (BATCH_SIZE + 300, 4 * BATCH_SIZE, CASES - 650, CASES):
        run(out, cases, workers=2, seed=cases)
    assert found(out) == found(untouched)
    assert corpus(out) == corpus(untouched)


def test_a_case_of_any_place_can_be_made_again(untouched):
    view = StoreView(untouched)
    try:
        for cell, count in list(view.cells().items())[::50]:
            case = example_case(view, count.batch, count.index)
            assert (case.mode, case.code) == (cell.mode, count.code)
    finally:
        view.close()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("DELETE FROM corpus WHERE id = 3", "case 3 of the corpus is missing"),
        ("UPDATE corpus SET data = x'00' WHERE id = 3", "a case of the corpus cannot be unpacked"),
        (
            NO_CASE,
            "case 3 of the corpus: code: missing",
        ),
        ("DELETE FROM pieces", "the corpus lacks a piece of memory"),
        ("UPDATE corpus SET batch = 99 WHERE id = 3", "in no order"),
        ("DELETE FROM epochs WHERE epoch = 2", "lacks an epoch"),
        ("UPDATE epochs SET energies = (SELECT energies FROM epochs WHERE epoch = 3)", "other cases"),
        ("UPDATE corpus SET cell = '[1]' WHERE id = 3", "Expected"),
    ],
)
def test_a_damaged_corpus_is_refused(untouched, tmp_path, damage, message):
    data = (untouched / "campaign.sqlite").read_bytes()
    (tmp_path / "campaign.sqlite").write_bytes(data)
    with sqlite3.connect(tmp_path / "campaign.sqlite") as db:
        db.execute(damage)
    view = StoreView(tmp_path)
    try:
        with pytest.raises(StoreError, match=message):
            corpus_of(view)
    finally:
        view.close()
