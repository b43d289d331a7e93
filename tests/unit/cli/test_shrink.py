"""`emufuzz shrink`: where results go, what is said of them, exit codes, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.json import case_to_obj
from emufuzz.cli.main import run as run_here
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.engines import campaign_versions, make_oracle, make_subject
from emufuzz.fuzz.finding_json import encode, finding_from_obj, finding_to_obj
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.shrink import non_default_fields

Run = Callable[..., "CompletedProcess[bytes]"]
BUG = "adc-carry"


@pytest.fixture(scope="module")
def findings():
    """Findings of a seeded bug as a campaign records them."""
    with seeded_bug(BUG):
        loop = CampaignLoop(make_subject(), make_oracle())
        found = loop.run_batch(0, generate_batch(1, 0, 2048, Options(("real", "prot64")))).findings
    assert len(found) > 2
    ran = campaign_versions() | {"seed_bug": BUG}
    return [finding_to_obj(finding, ran) for finding in found]


@pytest.fixture
def here(tmp_path, monkeypatch, capsys):
    """`here(*arguments)`: exit code, stdout and stderr of the command in this process, in its directory."""
    monkeypatch.chdir(tmp_path)

    def call(*args):
        code = run_here(["shrink", *map(str, args)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def shrunk_in(path: Path):
    value = json.loads(path.read_text())
    return value, finding_from_obj(value)


def test_a_finding_is_shrunk_into_a_file_beside_it(here, findings, tmp_path):
    (tmp_path / "f.json").write_bytes(encode(findings[0]))
    before = (tmp_path / "f.json").read_bytes()
    code, out, err = here("f.json")
    assert (code, err) == (0, "")
    assert (tmp_path / "f.json").read_bytes() == before
    value, finding = shrunk_in(tmp_path / "f.min.json")
    assert value["bucket"] == findings[0]["bucket"]
    assert value["versions"] == findings[0]["versions"]
    assert value["shrinking"]["complete"]
    assert len(non_default_fields(finding.case)) <= 5
    assert f"f.json: {value['bucket']}" in out
    assert "written: f.min.json" in out
    assert "fields:" in out


def test_shrinking_the_result_again_changes_no_byte_of_its_case(here, findings, tmp_path):
    (tmp_path / "f.json").write_bytes(encode(findings[0]))
    assert here("f.json")[0] == 0
    once, _ = shrunk_in(tmp_path / "f.min.json")
    assert here("f.min.json")[0] == 0
    again, _ = shrunk_in(tmp_path / "f.min.json")
    assert again["case"] == once["case"]
    assert again["differences"] == once["differences"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.json", "f.min.json"]


def test_each_line_of_a_file_goes_into_a_file_of_its_own(here, findings, tmp_path):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(value) + "\n" for value in findings[:2]))
    assert here("all.jsonl")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "all.1.min.json",
        "all.2.min.json",
        "all.jsonl",
    ]


def test_json_says_everything_on_one_line_each(here, findings, tmp_path):
    (tmp_path / "f.json").write_bytes(encode(findings[0]))
    code, out, _ = here("--json", "--output", "small.json", "f.json")
    (line,) = out.splitlines()
    said = json.loads(line)
    assert code == 0
    assert (said["where"], said["found"], said["output"]) == ("f.json", True, "small.json")
    assert said["calls"] >= sum(each["tried"] for each in said["passes"])
    assert said["finding"]["case"] == json.loads((tmp_path / "small.json").read_text())["case"]


def test_standard_output_gets_the_finding_alone(run: Run, findings):
    done = run("shrink", "-", data=json.dumps(findings[0]).encode())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["bucket"] == findings[0]["bucket"]
    assert b"cases were run" in done.stderr


def test_a_case_that_is_no_finding_is_said_to_be_none(here, tmp_path):
    (tmp_path / "nop.json").write_text(json.dumps(case_to_obj(build_case("prot32", b"\x90"))))
    assert here("nop.json") == (1, "nop.json: not shrunk: no finding\n", "")
    code, out, _ = here("--json", "nop.json")
    assert (code, json.loads(out)) == (1, {"where": "nop.json", "found": False, "reason": "no finding"})
    assert [path.name for path in tmp_path.iterdir()] == ["nop.json"]


def test_a_finding_that_is_gone_is_left_alone(here, findings, tmp_path):
    versions = {name: value for name, value in findings[0]["versions"].items() if name != "seed_bug"}
    (tmp_path / "f.json").write_bytes(encode({**findings[0], "versions": versions}))
    assert here("f.json") == (1, "f.json: not shrunk: the case is now no finding\n", "")
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_a_limit_is_kept_and_said(here, findings, tmp_path):
    (tmp_path / "f.json").write_bytes(encode(findings[0]))
    code, out, _ = here("--calls", "3", "f.json")
    assert code == 0
    assert "not shrunk to the end: 3 cases were run" in out
    assert "reason: incomplete: 3 calls were not enough" in out
    value, _ = shrunk_in(tmp_path / "f.min.json")
    assert not value["shrinking"]["complete"]


def changed(finding, **changes):
    return {**finding, **changes}


@pytest.mark.parametrize(("change", "says"), [
    (lambda f: {"case": f["case"], "expect": {}},         "f.json: a recorded vector, expected a finding"),
    (lambda f: changed(f, kind="nonsense"),               "f.json: kind: unknown kind 'nonsense'"),
    (lambda f: changed(f, differences=3),                 "f.json: differences: expected an array"),
    (lambda f: changed(f, case={**f["case"], "code": 1}), "f.json: case.code: "),
    (lambda f: changed(f, versions={"seed_bug": "none-such"}),
                                                          "f.json: versions.seed_bug: no bug 'none-such'"),
    (lambda f: changed(f, versions={"oracles": "unicorn,none-such"}),
                                                          "f.json: versions.oracles: no oracle 'none-such'"),
    (lambda f: changed(f, versions={"oracles": "unicorn,cmd:touch x"}),
                                                          "f.json: its oracle 'cmd:touch x' is a program"),
    (lambda f: [f],                                       "f.json: expected a JSON object"),
])  # fmt: skip
def test_bad_input_is_one_line_and_exit_2(here, findings, tmp_path, change, says):
    (tmp_path / "f.json").write_text(json.dumps(change(findings[0])))
    code, out, err = here("f.json")
    assert (code, out) == (2, "")
    assert err.startswith(f"emufuzz: {says}")
    assert len(err.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["f.json"]


def test_other_files_are_shrunk_although_one_is_bad(here, findings, tmp_path):
    (tmp_path / "bad.json").write_text("{")
    (tmp_path / "f.json").write_bytes(encode(findings[0]))
    code, _, err = here("bad.json", "gone.json", "f.json")
    assert code == 2
    assert len(err.splitlines()) == 2
    assert (tmp_path / "f.min.json").exists()


def test_one_output_takes_one_finding(here, findings, tmp_path):
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(value) + "\n" for value in findings[:2]))
    code, out, err = here("--output", "x.json", "all.jsonl")
    assert (code, out) == (2, "")
    assert err == "emufuzz: --output: takes the result of one finding, and there are several\n"
    assert not (tmp_path / "x.json").exists()


def test_an_output_that_cannot_be_written_is_one_line(here, findings, tmp_path):
    (tmp_path / "f.json").write_bytes(encode(findings[0]))
    code, _, err = here("--output", "/proc/none/x.json", "f.json")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "/proc/none" in err
