"""`emufuzz findings`: list, show, mark, export, triage; of campaigns that may come from anybody."""

from __future__ import annotations

import json
import sqlite3

import pytest
from support.stores import made_up, merge, new_store

from emufuzz.cli.main import run as run_here
from emufuzz.fuzz.finding import FAILED
from emufuzz.fuzz.finding_json import digest, finding_from_obj
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.shrink.run import PassLog

ONE = made_up()
SMALL = made_up(code=b"\x11\xc0")
TWO = made_up(leaf="13", mode="prot64", kind="rflags", code=b"\x13\xd8", index=4)
CRASH = made_up(leaf="", kind="crash", verdict=FAILED, index=8)
PASSES = (PassLog("prefixes", 4, 1, 3, 2),)


@pytest.fixture
def campaign(tmp_path):
    """A finished campaign of three findings, one of them shrunk."""
    store = new_store(tmp_path / "c")
    merge(store, 0, [ONE, TWO, CRASH])
    merge(store, 1, [made_up(batch=1)])
    store.save_shrunk(ONE.bucket, Shrunk(SMALL, PASSES, complete=True))
    store.finish("done", 2.0)
    store.close()
    return tmp_path / "c"


@pytest.fixture
def here(tmp_path, monkeypatch, capsys, campaign):
    """`here(*arguments)`: exit code, stdout and stderr of `emufuzz findings` beside the campaign `c`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def call(*args):
        code = run_here(["findings", *map(str, args)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def listed(here, *args):
    code, out, err = here("list", "c", "--json", *args)
    assert (code, err) == (0, "")
    return [json.loads(line) for line in out.splitlines()]


# --- list -----------------------------------------------------------------------------------------


def test_a_list_for_people(here):
    code, out, err = here("list", "c")
    assert (code, err) == (0, "")
    for word in ("name", ONE.bucket.name, "adc eax, eax", "new", "emulator is alone", CRASH.bucket.name):
        assert word in out


def test_a_list_for_programs_shows_the_shrunk_finding_and_its_digest(here, campaign):
    first, second, third = listed(here)
    exported = json.loads((campaign / "findings" / f"{ONE.bucket.name}.json").read_text())
    assert first["digest"] == digest(exported)
    assert (first["name"], first["cases"], first["shrunk"]) == (ONE.bucket.name, 2, True)
    assert (first["leaf"], first["kind"], first["verdict"]) == ("11", "gpr", "alone")
    assert first["instruction"] == "adc eax, eax"
    assert "gpr.rax" in first["fields"]
    assert (second["batch"], second["index"], second["shrunk"]) == (0, 4, False)
    assert third["verdict"] == "failed"


@pytest.mark.parametrize(("options", "names"), [
    (("--leaf", "13"),                 [TWO]),
    (("--mode", "prot32"),             [ONE, CRASH]),
    (("--mode", "prot32,prot64"),      [ONE, TWO, CRASH]),
    (("--place", "prot64"),            [TWO]),
    (("--kind", "gpr,crash"),          [ONE, CRASH]),
    (("--verdict", "failed"),          [CRASH]),
    (("--state", "known,bug"),         []),
    (("--sort", "name"),               [ONE, TWO, CRASH]),
    (("--sort", "cases"),              [ONE, TWO, CRASH]),
])  # fmt: skip
def test_some_of_them(here, options, names):
    assert [one["name"] for one in listed(here, *options)] == [finding.bucket.name for finding in names]


def test_an_empty_list_says_so(here):
    assert here("list", "c", "--state", "bug") == (0, "no findings\n", "")


@pytest.mark.parametrize(("args", "says"), [
    (("list", "c", "--state", "odd"),             "--state: unknown state 'odd', known are new, known, bug"),
    (("list", "c", "--kind", "odd"),              "--kind: unknown kind 'odd'"),
    (("list", "c", "--sort", "odd"),              "--sort: unknown order 'odd'"),
    (("list", "none"),                            "none: no such directory"),
    (("show", "c", "nothing"),                    "c: no finding 'nothing'"),
    (("mark", "c", "nothing", "--state", "bug"),  "c: no finding 'nothing'"),
    (("mark", "c", "x", "--state", "odd"),        "--state: unknown mark 'odd'"),
    (("triage", "c", "--filters", "odd"),         "--filters: unknown filter 'odd'"),
    (("triage", "c", "--known", "none"),          "--known: none: no such directory"),
    (("export", "c", "--to", "c/campaign.sqlite"), "--to: c/campaign.sqlite: neither a directory nor a file"),
])  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(here, args, says):
    code, out, err = here(*args)
    assert (code, out) == (2, "")
    assert err.startswith(f"emufuzz: {says}")
    assert len(err.splitlines()) == 1


# --- show -----------------------------------------------------------------------------------------


def test_a_finding_is_shown_with_its_shrinking_and_explained(here):
    code, out, _ = here("show", "c", ONE.bucket.name)
    assert code == 0
    command = f"emufuzz repro c/findings/{ONE.bucket.name}.json"
    for text in (f"finding {ONE.bucket.name}", "cases     2", "batch 0, case 0", "prefixes", "shrunk",
                 "adc eax, eax", "conclusion:", command):  # fmt: skip
        assert text in out
    _, before, _ = here("show", "c", ONE.bucket.name, "--found")
    assert "adc eax, ebx" in before
    assert "findings export c" in before


def test_a_crash_is_shown_but_not_run(here):
    code, out, _ = here("show", "c", CRASH.bucket.name)
    assert code == 0
    assert "not run again, as it may end this process, too" in out


def test_a_finding_for_programs(here):
    code, out, _ = here("show", "c", ONE.bucket.name, "--json")
    value = json.loads(out)
    assert code == 0
    assert value["shrinking"]["passes"] == [["prefixes", 4, 1, 3, 2]]
    assert value["run"]["workers"] == "local:1"
    assert finding_from_obj(value["finding"]).case.code == b"\x11\xc0"
    found = json.loads(here("show", "c", ONE.bucket.name, "--json", "--found")[1])
    assert finding_from_obj(found["finding"]).case.code == b"\x11\xd8"


# --- mark -----------------------------------------------------------------------------------------


def test_marks_are_made_listed_and_taken_away(here):
    names = (ONE.bucket.name, TWO.bucket.name)
    assert here("mark", "c", *names, "--state", "bug", "--note", "reported") == (0, "", "")
    marked = listed(here, "--state", "bug")
    assert [(one["name"], one["note"], one["reason"]) for one in marked] == [
        (name, "reported", "marked by hand") for name in names
    ]
    assert here("mark", "c", ONE.bucket.name, "--state", "none")[0] == 0
    assert [one["name"] for one in listed(here, "--state", "bug")] == [TWO.bucket.name]


def test_a_name_that_is_wrong_marks_nothing(here):
    assert here("mark", "c", ONE.bucket.name, "nothing", "--state", "bug")[0] == 2
    assert listed(here, "--state", "bug") == []


def test_a_note_that_is_too_long_is_refused(here):
    code, _, err = here("mark", "c", ONE.bucket.name, "--state", "bug", "--note", "x" * 5000)
    assert (code, err) == (2, "emufuzz: --note: 5000 characters, at most 4096 are taken\n")


# --- export ---------------------------------------------------------------------------------------


def test_findings_are_exported_one_file_each_or_one_line_each(here, campaign, tmp_path):
    assert here("export", "c", "--to", "out")[0] == 0
    exported = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert exported == {path.name: path.read_bytes() for path in (campaign / "findings").iterdir()}
    assert here("export", "c", ONE.bucket.name, "--to", "one.jsonl", "--found")[0] == 0
    (line,) = (tmp_path / "one.jsonl").read_text().splitlines()
    assert finding_from_obj(json.loads(line)).case.code == b"\x11\xd8"
    code, out, _ = here("export", "c", "--to", "-", "--state", "new")
    assert (code, len(out.splitlines())) == (0, 3)


def test_files_that_are_in_the_way_stay(here, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{TWO.bucket.name}.json").write_text("mine")
    code, _, err = here("export", "c", "--to", "out")
    assert code == 2
    assert "exists (--force replaces it)" in err
    assert [path.read_text() for path in (tmp_path / "out").iterdir()] == ["mine"]
    assert here("export", "c", "--to", "out", "--force")[0] == 0
    assert len(list((tmp_path / "out").iterdir())) == 3


def test_names_of_a_strangers_campaign_stay_in_the_directory(here, campaign, tmp_path):
    with sqlite3.connect(campaign / "campaign.sqlite") as db:
        db.execute("UPDATE findings SET name = '../../escaped' WHERE leaf = '13'")
    code, _, err = here("export", "c", "--to", "out/deep")
    assert code == 2
    assert "is damaged" in err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "escaped.json").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"case":', "[" * 100_000, '{"case":{"code":"90"}}'])
def test_damaged_findings_are_one_line(here, campaign, text):
    with sqlite3.connect(campaign / "campaign.sqlite") as db:
        db.execute("UPDATE findings SET found = ?, shrunk = NULL WHERE leaf = '13'", (text,))
    for command in (("list", "c"), ("show", "c", TWO.bucket.name), ("export", "c", "--to", "x.jsonl")):
        code, _, err = here(*command)
        assert code == 2
        assert f"finding {TWO.bucket.name} is damaged" in err
        assert len(err.splitlines()) == 1


def test_text_from_a_campaign_does_not_reach_the_terminal_raw(here, campaign):
    with sqlite3.connect(campaign / "campaign.sqlite") as db:
        db.execute("UPDATE findings SET note = ?", ("\x1b]0;owned\x07\x1b[2J",))
    for command in (("list", "c"), ("show", "c", CRASH.bucket.name)):
        assert "\x1b" not in here(*command)[1]


# --- triage ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_triage_again_says_what_the_present_code_explains(here):
    """The made-up findings are none: the emulator and Unicorn agree on ADC."""
    code, out, _ = here("triage", "c", "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["new"] == []
    assert summary["by_filter"] == {"gone": 3}
    assert {one["state"] for one in listed(here)} == {"explained"}
    assert here("triage", "c", "--filters", "duplicate")[0] == 0
