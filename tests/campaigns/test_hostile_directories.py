"""Campaign directories that are damaged, made up, or used by somebody else: one clear line, nothing lost."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from support.campaigns import finish, found, start, write_entry

from emufuzz.fuzz.cells import UNKNOWN_CPL, Cell, CellCount
from emufuzz.fuzz.config import CampaignConfig, ConfigError, config_of
from emufuzz.fuzz.store import Store, StoreError, StoreView
from emufuzz.fuzz.store.marker import StoreMarker
from emufuzz.fuzz.store.schema import APPLICATION_ID, STEPS, VERSION

ALONE = ("--oracles", "unicorn")
BEGIN = (
    *("fuzz", "--cases", 2500, "--modes", "real,prot64", "--seed-bug", "adc-carry"),
    *("--workers", "local:1", *ALONE),
)


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_entry(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def campaign(entry, tmp_path_factory):
    """A finished campaign with findings."""
    out = tmp_path_factory.mktemp("made") / "out"
    assert finish(start(entry, *BEGIN, "--out", out))[0] == 1
    return out


@pytest.fixture
def copy(campaign, tmp_path):
    """A copy of it to be damaged."""
    return Path(shutil.copytree(campaign, tmp_path / "copy"))


def resume(entry, out, *args):
    command = ("fuzz", "--resume", "--cases", 5000, "--workers", "local:1", *args, "--out", out)
    return finish(start(entry, *command))


def refused(entry, out, *args):
    """The one line that says why a campaign cannot go on."""
    code, printed, err = resume(entry, out, *args)
    assert (code, printed) == (2, "")
    assert len(err.splitlines()) == 1
    assert str(out) in err
    return err


def edit(out, statement, values=()):
    with sqlite3.connect(out / "campaign.sqlite") as db:
        db.execute(statement, values)


@pytest.mark.parametrize("size", [0, 1, 100, 4096, 20_000])
def test_a_truncated_file_is_refused_and_left_alone(entry, copy, size):
    file = copy / "campaign.sqlite"
    file.write_bytes(file.read_bytes()[:size])
    refused(entry, copy)
    with pytest.raises(StoreError, match=r"it is empty|malformed|not a database|damaged"):
        StoreView(copy)
    assert len(file.read_bytes()) == size
    assert list((copy / "findings").iterdir())


def read_or_refused(directory):
    """What becomes of opening and reading a store; a refusal starts with the directory that it names."""
    try:
        with closing(Store(directory)) as store:
            store.totals()
            store.records()
    except StoreError as error:
        return f"refused: {str(error)[: len(str(directory))]}"
    return "read"


def test_random_damage_is_refused_or_harmless(copy, campaign):
    whole = (campaign / "campaign.sqlite").read_bytes()
    outcomes = set()
    for at in range(0, len(whole), max(1, len(whole) // 60)):
        (copy / "campaign.sqlite").write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])
        outcomes.add(read_or_refused(copy))
    assert "refused: " + str(copy) in outcomes
    assert outcomes <= {"refused: " + str(copy), "read"}


def test_counts_that_do_not_add_up_are_refused(entry, copy):
    edit(copy, "UPDATE counts SET n = n + 1 WHERE kind = 'skipped'")
    assert "its counts do not add up to 2500 cases" in refused(entry, copy)


def test_a_newer_file_is_refused(entry, copy):
    edit(copy, f"PRAGMA user_version={VERSION + 1}")
    assert f"version {VERSION + 1} of the file, this one knows {VERSION}" in refused(entry, copy)


@pytest.mark.parametrize(
    "statement",
    [
        "CREATE TRIGGER t AFTER INSERT ON batches BEGIN DELETE FROM findings; END",
        "CREATE VIEW v AS SELECT * FROM findings",
        "CREATE TABLE other(x)",
        "DROP TABLE history",
    ],
)
def test_other_tables_are_refused(entry, copy, statement):
    edit(copy, statement)
    assert "its tables are others" in refused(entry, copy)


def test_another_programs_database_is_refused(entry, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    with sqlite3.connect(out / "campaign.sqlite") as db:
        db.execute("CREATE TABLE cookies(x)")
    assert "not a campaign" in refused(entry, out)


def test_an_older_file_is_brought_up_to_date(copy):
    (copy / "campaign.sqlite").rename(copy / "new.sqlite")
    with sqlite3.connect(copy / "campaign.sqlite") as db:
        db.executescript(STEPS[0])
        db.execute("ATTACH ? AS new", (str(copy / "new.sqlite"),))
        for table in ("meta", "runs", "batches", "counts", "findings"):
            db.execute(f"INSERT INTO {table} SELECT * FROM new.{table}")  # noqa: S608 - names from above
        db.execute("INSERT INTO counts VALUES('coverage', 'f6/1' || char(9) || 'real', 2400)")
        db.commit()
        db.execute(f"PRAGMA application_id={APPLICATION_ID}")
        db.execute("PRAGMA user_version=1")
    (copy / "new.sqlite").unlink()
    with pytest.raises(StoreError, match="older emufuzz"):
        StoreView(copy)
    store = Store(copy)
    assert store.totals().cases == 2500
    assert store.cells() == {
        Cell("f6/1", "real", UNKNOWN_CPL, "", ""): CellCount(2400, batch=-1, index=-1),
        Cell("", "", UNKNOWN_CPL, "", ""): CellCount(100, batch=-1, index=-1),
    }
    store.grow(2500, 1.0, 7, 3)
    assert store.history()[-1] == (2500, 1.0, 7, 3)
    store.close()


def test_names_stay_inside_the_directory(copy, tmp_path):
    edit(copy, "UPDATE findings SET place = '../../../escaped', leaf = '/etc/passwd'")
    before = sorted(path for path in tmp_path.rglob("*") if copy not in path.parents)
    Store(copy).close()
    assert sorted(path for path in tmp_path.rglob("*") if copy not in path.parents) == before
    assert any(".._.._.._escaped" in path.name for path in (copy / "findings").iterdir())


def test_a_findings_directory_that_leads_elsewhere_is_refused(entry, copy, tmp_path):
    shutil.rmtree(copy / "findings")
    (tmp_path / "elsewhere").mkdir()
    (copy / "findings").symlink_to(tmp_path / "elsewhere")
    refused(entry, copy)
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_lock_that_leads_elsewhere_is_refused(entry, copy, tmp_path):
    (copy / "campaign.lock").unlink(missing_ok=True)
    (tmp_path / "precious").write_text("x")
    (copy / "campaign.lock").symlink_to(tmp_path / "precious")
    refused(entry, copy)
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.parametrize("name", ["campaign.sqlite", "campaign.sqlite-wal", "campaign.sqlite-shm",
                                  "campaign.sqlite-journal"])  # fmt: skip
@pytest.mark.parametrize("opened", [Store, StoreView, StoreMarker])
def test_files_of_the_database_that_lead_elsewhere_are_refused(copy, tmp_path, name, opened):
    elsewhere = tmp_path / "precious"
    elsewhere.write_bytes((copy / name).read_bytes() if (copy / name).exists() else b"precious")
    before = elsewhere.read_bytes()
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(elsewhere)
    with pytest.raises(StoreError, match=f"{name}: a link, which is not followed"):
        opened(copy)
    assert elsewhere.read_bytes() == before


def test_exports_do_not_go_through_links(copy, tmp_path):
    (tmp_path / "precious").write_text("x")
    (copy / "findings" / "link").symlink_to(tmp_path / "precious")
    export = next(path for path in (copy / "findings").iterdir() if path.suffix == ".json")
    export.unlink()
    export.symlink_to(tmp_path / "precious")
    (copy / "findings" / f".{export.name}.{os.getpid()}.tmp").symlink_to(tmp_path / "precious")
    Store(copy).close()
    assert (tmp_path / "precious").read_text() == "x"
    assert not export.is_symlink()


@pytest.mark.parametrize("name", ["campaign.sqlite-wal", "findings", "campaign.lock"])
def test_no_campaign_is_made_where_something_leads_elsewhere(tmp_path, name):
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "elsewhere").mkdir()
    (out / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="not empty and not a campaign directory"):
        Store.create(out, CampaignConfig(), None)
    assert [path.name for path in out.iterdir()] == [name]
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        '{"seed": -1}',
        '{"seed": "1"}',
        '{"modes": ["prot65"]}',
        '{"oracles": ["native"]}',
        '{"subject": "rm -rf /"}',
        '{"bug": "none-such"}',
        '{"states": 1000000}',
        '{"unknown": 1}',
        '{"paths": ["ud"]}',
        '{"modes": [' + '"real",' * 20000 + '"real"]}',
    ],
)
def test_made_up_configurations_are_refused(entry, copy, text):
    with pytest.raises(ConfigError):
        config_of(text)
    edit(copy, "UPDATE meta SET value = ? WHERE key = 'config'", (text,))
    code, _, err = resume(entry, copy)
    assert code == 2
    assert len(err.splitlines()) == 1


def test_an_oracle_of_a_strangers_campaign_is_not_run_unasked(entry, copy, tmp_path):
    """A configuration may name a command; who resumes somebody else's campaign has to say so."""
    trap = tmp_path / "trap"
    oracles = ("unicorn", f"cmd:touch {trap}")
    config = CampaignConfig(oracles=oracles, modes=("real", "prot64"), bug="adc-carry")
    edit(copy, "UPDATE meta SET value = ? WHERE key = 'config'", (config.to_json(),))
    error = refused(entry, copy)
    assert "--oracles" in error
    assert not trap.exists()


def test_a_subject_of_a_strangers_campaign_is_not_run_unasked(entry, copy, tmp_path):
    trap = tmp_path / "trap"
    config = CampaignConfig(subject=f"cmd:touch {trap}", modes=("real", "prot64"))
    edit(copy, "UPDATE meta SET value = ? WHERE key = 'config'", (config.to_json(),))
    error = refused(entry, copy)
    assert "--subject" in error
    assert not trap.exists()


def test_two_campaigns_in_one_directory(entry, copy):
    held = Store(copy)
    assert f"another campaign runs here (process {os.getpid()})" in refused(entry, copy)
    held.close()
    assert resume(entry, copy)[0] in {0, 1}


def test_deleted_exports_come_back(entry, copy, campaign):
    for path in (copy / "findings").iterdir():
        path.write_text("overwritten")
        path.unlink()
    (copy / "findings").rmdir()
    Store(copy).close()
    assert found(copy) == found(campaign)


def test_a_full_disk_ends_a_campaign_in_one_line_and_it_goes_on_later(entry, tmp_path):
    """A full disk, played by a limit on the size of files that the campaign's file comes to."""
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import resource, signal\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (250_000, 250_000))\n" + entry.read_text()
    )
    out, whole = tmp_path / "out", tmp_path / "whole"
    begin = ("fuzz", "--cases", 9000, "--modes", "real,prot64", "--seed-bug", "adc-carry", *ALONE)
    code, _, err = finish(start(limited, *begin, "--out", out))
    assert (code, len(err.splitlines())) == (2, 1)
    assert StoreView(out).totals().cases < 9000
    assert finish(start(entry, "fuzz", "--resume", "--out", out))[0] in {0, 1}
    assert finish(start(entry, *begin, "--out", whole))[0] == 1
    assert found(out) == found(whole)
