"""`emufuzz status`: a campaign from outside, while it runs, after it ended, after it was killed."""

from __future__ import annotations

import json
import os
import sqlite3

import pytest
from support.stores import made_up, merge, new_store

from emufuzz.cli.main import run as run_here
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.store.schema import APPLICATION_ID, STEPS

ONE = made_up()
TWO = made_up(kind="rflags", index=5)


@pytest.fixture
def store(tmp_path):
    made = new_store(tmp_path / "c", CampaignConfig(seed=7, modes=("real", "prot32")), budget=1000)
    merge(made, 0, [ONE, TWO])
    made.save_shrunk(ONE.bucket, Shrunk(ONE))
    made.grow(15, 1.0, 1, 2)
    yield made
    made.close()


@pytest.fixture
def status(tmp_path, monkeypatch, capsys):
    """`status(*arguments)`: exit code, stdout and stderr beside the campaign `c`."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        code = run_here(["status", *args])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def values(status):
    code, out, err = status("c", "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_everything_that_is_counted(store, status):
    found = values(status)
    assert (found["cases"], found["compared"], found["agreed"], found["budget"]) == (15, 12, 10, 1000)
    assert found["skipped"] == {"unicorn-x": 3}
    assert found["findings"] == {
        "total": 2, "cases": 2, "states": {"new": 2}, "verdicts": {"alone": 2}, "shrunk": 1, "unshrunk": 1,
    }  # fmt: skip
    assert found["coverage"]["covered"] == 1
    assert 0 < found["coverage"]["covered"] < found["coverage"]["coverable"]
    assert (found["elapsed"], found["rate"]) == (1.0, 15.0)
    assert found["growth"] == [{"cases": 15, "seconds": 1.0, "covered": 1, "findings": 2}]
    assert found["config"]["seed"] == 7


def test_running_finished_and_killed_campaigns(store, status):
    running = values(status)
    assert (running["running"], running["driver"]) == (True, os.getpid())
    assert running["runs"][0]["state"] == "running"
    store.close()
    killed = values(status)
    assert (killed["running"], killed["driver"], killed["runs"][0]["state"]) == (False, None, "killed")


def test_a_finished_campaign(store, status):
    store.finish("done", 3.0)
    store.close()
    found = values(status)
    assert (found["running"], found["runs"][0]["state"], found["elapsed"]) == (False, "done", 3.0)


def test_the_same_for_people(store, status):
    code, out, _ = status("c")
    assert code == 0
    for text in ("campaign  c: emulator against unicorn", "seed 7, modes real,prot32",
                 f"process {os.getpid()}", "15 of 1,000 (1.5 %)", "findings  2 (2 new; 2 alone)",
                 "unicorn-x", "run 1"):  # fmt: skip
        assert text in out


def test_looking_changes_nothing(store, status, tmp_path):
    before = (tmp_path / "c" / "campaign.sqlite").read_bytes()
    for _ in range(3):
        values(status)
    assert (tmp_path / "c" / "campaign.sqlite").read_bytes() == before
    merge(store, 1)
    assert values(status)["cases"] == 28


def test_text_from_a_campaign_does_not_reach_the_terminal_raw(store, status, tmp_path):
    with sqlite3.connect(tmp_path / "c" / "campaign.sqlite") as db:
        db.execute("UPDATE runs SET workers = ?", ("\x1b[2J",))
        db.execute("UPDATE counts SET key = ? WHERE kind = 'skipped'", ("\x1b[2J",))
    assert "\x1b" not in status("c")[1]


@pytest.mark.parametrize(("make", "says"), [
    (lambda c: None,                                         "no such directory"),
    (lambda c: c.mkdir(),                                    "no campaign here"),
    (lambda c: (c.mkdir(), (c / "campaign.sqlite").touch()), "it is empty"),
    (lambda c: (c.mkdir(), (c / "campaign.sqlite").write_bytes(b"x" * 4096)), "not a database"),
])  # fmt: skip
def test_what_is_no_campaign_is_one_line_and_exit_2(status, tmp_path, make, says):
    make(tmp_path / "c")
    code, out, err = status("c")
    assert (code, out) == (2, "")
    assert says in err
    assert len(err.splitlines()) == 1


def test_a_file_of_an_older_emufuzz_is_one_line_and_exit_2(status, tmp_path):
    (tmp_path / "c").mkdir()
    with sqlite3.connect(tmp_path / "c" / "campaign.sqlite") as db:
        db.executescript(f"{STEPS[0]} PRAGMA application_id={APPLICATION_ID}; PRAGMA user_version=1;")
    code, out, err = status("c")
    assert (code, out) == (2, "")
    assert "older emufuzz" in err
    assert len(err.splitlines()) == 1
