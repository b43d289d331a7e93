"""`emufuzz coverage`: sources, outputs, limits, comparison; the real command in an empty directory."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from pycobertura import Cobertura
from support.coverage import make_campaign

from emufuzz.arch.leaves import leaves_of
from emufuzz.cli import coverage_sources
from emufuzz.cli.coverage import _formats, _limits
from emufuzz.cli.errors import InputError
from emufuzz.cli.main import run
from emufuzz.report.coverage import document

ROOT = Path(__file__).parents[3]
SEEDS = ROOT / "corpus" / "seeds"


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    directory = tmp_path_factory.mktemp("made") / "campaign"
    make_campaign(directory, batches=1, size=512, modes=("real", "prot64"))
    return directory


def printed(capsys, *args):
    code = run(["coverage", *map(str, args)])
    out, err = capsys.readouterr()
    return code, out, err


def contents(campaign):
    """All files of a campaign but those of SQLite beside the database, which readers may leave."""
    files = (path for path in campaign.rglob("*") if path.is_file())
    return {path: path.read_bytes() for path in files if not path.name.startswith("campaign.sqlite-")}


def refused(capsys, *args):
    code, out, err = printed(capsys, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    return err


def test_a_campaign_is_read_and_left_alone(capsys, campaign):
    before = contents(campaign)
    code, out, err = printed(capsys, campaign)
    assert (code, err) == (0, "")
    assert "512 cases in " in out
    assert contents(campaign) == before


def test_json_can_be_read_again_and_gives_the_same(capsys, campaign, tmp_path):
    code, out, _ = printed(capsys, campaign, "--json")
    report = tmp_path / "report.json"
    report.write_text(out)
    assert code == 0
    assert printed(capsys, report, "--json") == (0, out, "")
    assert printed(capsys, "--diff", report, campaign)[0] == 0


def test_cases_are_run_and_their_first_lines_named(capsys):
    code, out, _ = printed(capsys, SEEDS / "bcd.jsonl", "--csv")
    _, *lines = out.splitlines()
    assert code == 0
    assert sum(int(line.split(",")[7]) for line in lines) == 40
    assert {line.split(",")[2] for line in lines} == {"bcd"}
    assert lines[0].split(",")[9].startswith(f"{SEEDS}/bcd.jsonl:")


def test_a_corpus_without_a_family_lacks_exactly_that_family(capsys, tmp_path):
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        for family in ("bcd", "stack", "flagop"):
            shutil.copy(SEEDS / f"{family}.jsonl", tmp_path / name)
    (tmp_path / "after" / "bcd.jsonl").unlink()
    code, out, _ = printed(capsys, "--diff", tmp_path / "before", tmp_path / "after", "--json")
    (found,) = json.loads(out)["families"]
    assert code == 1
    assert (found["family"], found["gone"], found["new"]) == ("bcd", list(leaves_of("bcd")), [])
    code, out, _ = printed(capsys, "--diff", tmp_path / "after", tmp_path / "before")
    assert code == 0
    assert "newly covered: bcd, 3 leaves, the whole family" in out


def test_a_case_of_a_campaign_again(capsys, campaign):
    rows = [row.split(",") for row in printed(capsys, campaign, "--csv")[1].splitlines()[1:]]
    where, code_bytes = rows[5][9], rows[5][10]
    code, out, _ = printed(capsys, campaign, "--case", where)
    assert code == 0
    assert json.loads(out)["code"] == code_bytes
    assert json.loads(out)["id"] == "s1-b" + where.replace(":", "-")


def test_limits_decide_the_exit_code(capsys, campaign):
    assert printed(capsys, campaign, "--csv", "--fail-under", "LEAF=1")[0] == 0
    code, _, err = printed(capsys, campaign, "--csv", "--fail-under", "leaf=99.9")
    assert code == 1
    assert err.startswith("emufuzz: LEAF: ")
    assert "is under 99.9 %" in err


def test_lines_are_measured_and_written_in_every_format(capsys, tmp_path):
    cases = tmp_path / "cases.jsonl"
    cases.write_text("".join((SEEDS / "bcd.jsonl").read_text().splitlines(keepends=True)[:3]))
    formats = {"html": "html", "lcov": "lines.lcov", "cobertura": "lines.xml", "json": "lines.json"}
    options = [part for form, name in formats.items() for part in ("--lines", f"{form}={tmp_path / name}")]
    code, out, err = printed(capsys, cases, *options, "--fail-under", "LINE=1,BRANCH=100")
    assert code == 1
    assert err.startswith("emufuzz: BRANCH: ")
    assert "emulator  " in out
    totals = json.loads((tmp_path / "lines.json").read_text())["totals"]
    assert f"{totals['covered_lines']:,} of {totals['num_statements']:,} lines" in out
    records = (tmp_path / "lines.lcov").read_text().split("end_of_record")
    files = {line for record in records for line in record.splitlines() if line.startswith("SF:")}
    assert any(file.endswith("emulator/insn/bcd.py") for file in files)
    hit = next(record for record in records if "emulator/insn/bcd.py" in record)
    assert any(line.startswith("DA:") and line.split(",")[1] != "0" for line in hit.splitlines())
    read = Cobertura(str(tmp_path / "lines.xml"))
    assert read.total_statements() == totals["num_statements"]
    assert round(read.line_rate(), 3) == round(totals["covered_lines"] / totals["num_statements"], 3)
    assert (tmp_path / "html" / "index.html").is_file()


@pytest.mark.slow
def test_genhtml_reads_the_lcov_file(capsys, tmp_path):
    """Needs Debian's package `lcov`."""
    lcov, report = tmp_path / "lines.lcov", tmp_path / "lines.json"
    options = ("--lines", f"lcov={lcov}", "--lines", f"json={report}")
    assert printed(capsys, SEEDS / "bcd.jsonl", *options)[0] == 0
    command = ["genhtml", str(lcov), "--output-directory", str(tmp_path / "html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    totals = json.loads(report.read_text())["totals"]
    assert f"({totals['covered_lines']} of {totals['num_statements']} lines)" in done.stdout
    assert (tmp_path / "html" / "index.html").is_file()


def test_a_page_is_written_whole(capsys, campaign, tmp_path):
    assert printed(capsys, campaign, "--csv", "--html", tmp_path / "page.html")[0] == 0
    assert (tmp_path / "page.html").read_text().rstrip().endswith("</html>")
    missing = tmp_path / "no" / "page.html"
    said = refused(capsys, campaign, "--html", missing)
    assert said == f"emufuzz: --html: {missing}: no such file or directory\n"
    assert refused(capsys, campaign, "--html", tmp_path) == f"emufuzz: --html: {tmp_path}: is a directory\n"
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_a_campaign_that_has_not_begun_can_be_shown(capsys, tmp_path):
    make_campaign(tmp_path / "empty", batches=0)
    code, out, err = printed(capsys, tmp_path / "empty", "--html", tmp_path / "page.html")
    assert (code, err) == (0, "")
    assert "0 cases in 0 cells" in out
    assert '<dd id="sum-cases">0</dd>' in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--csv", "--json"], "--csv: not together with --json"),
        (["--lines", "pdf=x"], "--lines: 'pdf=x' is none of html=PATH"),
        (["--lines", "html=/dev/null"], "--lines: /dev/null: not a directory"),
        (["--lines", "lcov=/"], "--lines: /: is a directory"),
        (["--lines", "json=/dev/null"], "--lines: /dev/null: not a regular file"),
        (["--lines", "cobertura=no/such/x"], "--lines: no/such/x: no such file or directory"),
        (["--html", ""], "--html: .: is a directory"),
        (["--html", "/dev/null"], "--html: /dev/null: not a regular file"),
        (["--fail-under", "PATH=3"], "--fail-under: 'PATH=3' is none of LINE=PERCENT"),
        (["--fail-under", "LEAF=many"], "'many' is no number"),
        (["--fail-under", "LEAF=101"], "must be 0 to 100"),
        (["--fail-under", "LEAF=nan"], "must be 0 to 100"),
        (["--case", "x"], "--case: 'x' is not BATCH:PLACE"),
        (["--case", f"{1 << 63}:0"], "is not BATCH:PLACE"),
        (["--case", "7:7"], "no case 7 of batch 7 was run"),
        (["--diff"], "--diff: compares two sources, got 1"),
        (["--diff", "x", "--csv"], "--diff: only together with --json"),
    ],
)
def test_options_that_cannot_be_are_refused(capsys, campaign, args, said):
    assert said in refused(capsys, campaign, *args)


def test_sources_that_cannot_be_are_refused(capsys, campaign, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"mode":"real"}\n')
    (tmp_path / "report.json").write_text('{"coverage_format": 1}')
    assert "bad.jsonl: code: missing" in refused(capsys, tmp_path / "bad.jsonl")
    assert "not a coverage report" in refused(capsys, tmp_path / "report.json")
    assert "no such file" in refused(capsys, tmp_path / "nothing")
    assert "stands alone" in refused(capsys, campaign, SEEDS)


def test_a_report_without_end_is_not_read_to_it(capsys, monkeypatch):
    monkeypatch.setattr(coverage_sources, "is_report", lambda path: True)
    monkeypatch.setattr(coverage_sources, "MAX_DOCUMENT", 1000)
    monkeypatch.setattr(document, "MAX_DOCUMENT", 1000)
    assert refused(capsys, "/dev/zero") == "emufuzz: /dev/zero: longer than 0 MiB\n"


def test_several_limits_and_formats():
    assert _limits(["LINE=80,leaf=90", "BRANCH=7.5"]) == {"LINE": 80, "LEAF": 90, "BRANCH": 7.5}
    assert _formats(["html=a=b"]) == [("html", Path("a=b"))]
    with pytest.raises(InputError, match="lcov"):
        _formats(["lcov"])
