"""A campaign's file: what a batch changes, what a kill leaves, what readers and markers see meanwhile."""

from __future__ import annotations

import os
import sqlite3

import pytest
from support.stores import VERSIONS, made_up, merge, new_store

from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.finding import FAILED
from emufuzz.fuzz.finding_json import finding_from_obj
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.store import Store, StoreError, StoreView
from emufuzz.fuzz.store.lock import DirectoryLock, driver_of
from emufuzz.fuzz.store.marker import BY_HAND, MAX_NOTE, StoreMarker
from emufuzz.fuzz.store.records import BUG, EXPLAINED, KNOWN, NEW
from emufuzz.fuzz.store.schema import APPLICATION_ID, STEPS, VERSION, SchemaError, check, upgrade

ONE = made_up()
TWO = made_up(kind="rflags", index=5)
FAILURE = made_up(kind="crash", index=9, verdict=FAILED)


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out"


@pytest.fixture
def store(out):
    made = new_store(out, budget=5000)
    yield made
    made.close()


def test_a_new_campaign_is_empty(store, out):
    assert store.progress() == (0, 0)
    assert store.totals().cases == 0
    assert store.records() == []
    assert store.budget() == 5000
    assert store.config() == CampaignConfig()
    names = sorted(path.name for path in out.iterdir() if not path.name.startswith("campaign.sqlite-"))
    assert names == ["campaign.lock", "campaign.sqlite", "findings"]


def test_a_merged_batch_is_all_there(store, out):
    merge(store, 0, [ONE, TWO])
    view = StoreView(out)
    totals = view.totals()
    assert (totals.cases, totals.agreed, totals.skipped, totals.balanced) == (15, 10, {"unicorn-x": 3}, True)
    assert totals.bucket_cases == {ONE.bucket: 1, TWO.bucket: 1}
    assert [(*cell, count.cases) for cell, count in view.cells().items()] == [
        ("11", "prot32", 0, "ok", "", 15)
    ]
    assert view.progress() == (0, 15)
    assert [record.bucket for record in view.records()] == [ONE.bucket, TWO.bucket]
    exported = sorted(path.name for path in view.findings.iterdir())
    assert exported == [f"{ONE.bucket.name}.json", f"{TWO.bucket.name}.json"]
    view.close()


def test_a_bucket_keeps_its_first_case_and_counts_the_others(store):
    merge(store, 0, [ONE])
    merge(store, 1, [made_up(batch=1, index=2, code=b"\x11\xc0"), TWO])
    found = {record.bucket: record for record in store.records()}
    assert len(found) == 2
    first = found[ONE.bucket]
    assert (first.batch, first.position, first.cases) == (0, 0, 2)
    assert finding_from_obj(first.document).case.code == ONE.case.code


def test_a_batch_is_merged_once(store):
    merge(store, 0, [ONE])
    with pytest.raises(StoreError):
        merge(store, 0, [TWO])
    assert store.totals().cases == 14
    assert [record.bucket for record in store.records()] == [ONE.bucket]


def test_a_batch_may_be_merged_in_parts(store):
    merge(store, 0, [ONE], first=0)
    merge(store, 0, [TWO], first=14)
    assert store.progress() == (0, 28)
    assert store.totals().cases == 28


def test_what_fails_in_the_middle_of_a_batch_changes_nothing(store, monkeypatch):
    merge(store, 0, [ONE])
    monkeypatch.setattr(
        store, "_insert", lambda finding, _: ("INSERT INTO nowhere VALUES(?)", (finding.leaf,))
    )
    with pytest.raises(StoreError, match="nowhere"):
        merge(store, 1, [TWO])
    assert store.totals().cases == 14
    assert store.progress() == (0, 14)


def test_exports_that_a_kill_left_out_are_made_again(store, out):
    merge(store, 0, [ONE, TWO])
    store.close()
    texts = {path.name: path.read_bytes() for path in (out / "findings").iterdir()}
    (out / "findings" / f"{ONE.bucket.name}.json").unlink()
    (out / "findings" / f"{TWO.bucket.name}.json").write_text("half")
    (out / "findings" / ".x.json.1.tmp").write_text("half")
    Store(out).close()
    assert {path.name: path.read_bytes() for path in (out / "findings").iterdir()} == texts


def test_shrunk_findings_replace_their_exports_and_keep_what_was_found(store, out):
    merge(store, 0, [ONE, TWO, FAILURE])
    store.save_shrunk(ONE.bucket, Shrunk(made_up(code=b"\x11\xc0"), complete=True))
    store.not_shrunk(TWO.bucket, "shrinking it ends in a crash: exit code 3")
    assert [record.bucket for record in store.unshrunk()] == [FAILURE.bucket]
    first, second, _ = store.records()
    assert finding_from_obj(first.document).case.code == b"\x11\xc0"
    assert ONE.case.code.hex() in first.found
    assert second.shrunk is None
    assert "exit code 3" in second.passes
    assert (out / "findings" / f"{ONE.bucket.name}.json").read_text() == first.best


def test_runs_say_when_with_what_and_how_they_ended(store, out):
    merge(store, 0)
    store.close()
    again = Store(out)
    again.begin("ray:2", VERSIONS | {"python": "3"})
    again.finish("done", 4.5)
    first, second = again.runs()
    again.close()
    assert (first["state"], first["workers"], first["seconds"]) == ("killed", "local:1", 1.0)
    assert (second["state"], second["workers"], second["seconds"]) == ("done", "ray:2", 4.5)
    assert second["versions"]["python"] == "3"


def test_when_batches_were_merged_counts_on_over_runs(store, out):
    merge(store, 0)
    merge(store, 1)
    store.close()  # as if it was killed: the run has the time of its last batch
    again = Store(out)
    again.begin("local:1", VERSIONS)
    merge(again, 2, seconds=0.25)
    again.finish("done", 0.5)
    assert again.elapsed() == [(0, 0, 13, 13, 1.0), (1, 0, 13, 26, 1.0), (2, 0, 13, 39, 1.25)]
    assert again.seconds() == 1.5
    again.close()


@pytest.mark.parametrize("seconds", [-1.0, 1e300, float("inf")])
@pytest.mark.parametrize("table", ["runs", "elapsed", "history"])
def test_times_that_are_none_are_damage(store, out, table, seconds):
    merge(store, 0)
    store.grow(13, 1.0, 1, 0)
    with sqlite3.connect(out / "campaign.sqlite") as db:
        db.execute(f"UPDATE {table} SET seconds = ?", (seconds,))  # noqa: S608 - from above
    with pytest.raises(StoreError, match="damaged: a time of"):
        {"runs": store.seconds, "elapsed": store.elapsed, "history": store.history}[table]()


def test_growth_is_kept_in_order(store):
    store.grow(4096, 2.0, 8, 1)
    store.grow(2048, 1.0, 7, 0)
    store.grow(4096, 2.5, 9, 1)
    assert store.history() == [(2048, 1.0, 7, 0), (4096, 2.5, 9, 1)]


def test_readers_see_one_moment_while_a_driver_writes(store, out):
    merge(store, 0)
    view = StoreView(out)
    with view.snapshot():
        before = view.totals().cases
        merge(store, 1)
        assert view.totals().cases == before == 13
    assert view.totals().cases == 26
    view.close()


def test_readers_write_nothing(store, out):
    view = StoreView(out)
    with pytest.raises(StoreError, match="readonly"):
        view.rows("DELETE FROM meta")
    view.close()


def test_one_driver_per_directory(store, out):
    assert driver_of(out) == os.getpid()
    with pytest.raises(StoreError, match=rf"another campaign runs here \(process {os.getpid()}\)"):
        Store(out)
    store.close()
    assert driver_of(out) is None
    lock = DirectoryLock(out)
    assert driver_of(out) == os.getpid()
    lock.release()


# --- marks ----------------------------------------------------------------------------------------


@pytest.fixture
def marker(store, out):
    merge(store, 0, [ONE, TWO])
    made = StoreMarker(out)
    yield made
    made.close()


def test_marks_are_made_while_the_driver_runs(marker, store):
    marker.mark([ONE.bucket.name], KNOWN, "seen in 5.4")
    merge(store, 1, [made_up(batch=1)])
    first, second = store.records()
    assert (first.state, first.reason, first.note, first.cases) == (KNOWN, BY_HAND, "seen in 5.4", 2)
    assert (second.state, second.reason) == (NEW, "")


def test_all_that_are_named_are_marked_or_none(marker):
    with pytest.raises(StoreError, match="no finding 'nothing'"):
        marker.mark([ONE.bucket.name, "nothing"], BUG)
    assert {record.state for record in marker.records()} == {NEW}


def test_filters_do_not_overrule_people(marker):
    marker.mark([ONE.bucket.name], BUG)
    assert not marker.judged(ONE.bucket.name, EXPLAINED, "known-gap: x")
    assert marker.judged(TWO.bucket.name, EXPLAINED, "known-gap: x")
    assert [record.state for record in marker.records()] == [BUG, EXPLAINED]
    marker.unmark([ONE.bucket.name])
    assert marker.judged(ONE.bucket.name, EXPLAINED, "known-gap: x")


def test_a_note_stays_until_there_is_another_one(marker):
    marker.mark([ONE.bucket.name], BUG, "first")
    marker.mark([ONE.bucket.name], KNOWN)
    assert marker.record(ONE.bucket.name).note == "first"
    marker.unmark([ONE.bucket.name], "second")
    assert marker.record(ONE.bucket.name).note == "second"


@pytest.mark.parametrize(("state", "note"), [
    ("explained", None), ("nonsense", None), (BUG, "x" * (MAX_NOTE + 1)),
])  # fmt: skip
def test_what_is_no_mark(marker, state, note):
    with pytest.raises(ValueError, match=r"no mark|a note of"):
        marker.mark([ONE.bucket.name], state, note)


# --- the format -----------------------------------------------------------------------------------


def test_an_empty_file_becomes_one_of_the_present_version():
    db = sqlite3.connect(":memory:")
    assert check(db) == 0
    upgrade(db)
    version = check(db)
    upgrade(db)
    assert check(db) == version > 1
    db.close()


def test_an_older_file_knows_the_times_that_its_history_has(tmp_path):
    db = sqlite3.connect(":memory:", isolation_level=None)
    db.executescript("".join(STEPS[:4]))
    db.execute(f"PRAGMA application_id={APPLICATION_ID}")
    db.execute("PRAGMA user_version=4")
    db.execute("INSERT INTO runs VALUES(1, '', 61.5, 'local:1', '{}', 'done')")
    for place in ((0, 0, 2048), (1, 0, 1000), (1, 1000, 1048), (2, 0, 2048), (10, 0, 5)):
        db.execute("INSERT INTO batches VALUES(?, ?, ?, 0, 0, 0, 1)", place)
    db.executemany("INSERT INTO history VALUES(?, ?, 0, 0)", [(3048, 30.5), (6144, 60.0), (6149, 61.5)])
    upgrade(db)
    assert db.execute("SELECT * FROM elapsed ORDER BY number, first").fetchall() == [
        (1, 0, 30.5), (2, 0, 60.0), (10, 0, 61.5),
    ]  # fmt: skip
    assert check(db) == VERSION
    db.close()


def test_a_file_of_somebody_else_is_none():
    db = sqlite3.connect(":memory:")
    db.execute("CREATE TABLE cookies(x)")
    with pytest.raises(SchemaError, match="not a campaign"):
        check(db)
    db.close()
