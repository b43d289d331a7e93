"""`emufuzz fuzz`: exit codes, bad input in one line, what it prints and leaves behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from emufuzz.fuzz.bugs import BUGS

ROOT = Path(__file__).parents[3]
RUN = "import sys; from emufuzz.cli.main import run\nif __name__ == '__main__': sys.exit(run(sys.argv[1:]))"


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    """A script that is the console script; worker processes import it, as they do the real one."""
    path = tmp_path_factory.mktemp("bin") / "emufuzz_entry.py"
    path.write_text(RUN)
    return path


def fuzz(entry, *args):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, str(entry), "fuzz", *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--cases", "-5"], "--cases"),
        (["--cases", "0"], "--cases"),
        (["--cases", "many"], "--cases"),
        (["--seconds", "-1"], "--seconds"),
        (["--seconds", "nan"], "--seconds"),
        (["--modes", "real,prot65"], "prot65"),
        (["--modes", ","], "--modes"),
        (["--workers", "0"], "--workers"),
        (["--states", "0"], "--states"),
        (["--seed", "-1"], "--seed"),
        (["--seed-bug", "none-such"], "none-such"),
    ],
)
def test_bad_options_are_one_line_and_exit_2(entry, tmp_path, args, says):
    done = fuzz(entry, *args, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stdout == ""
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_directory_of_something_else_is_refused(entry, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    done = fuzz(entry, "--cases", "10", "--out", tmp_path)
    assert done.returncode == 2
    assert "not a campaign directory" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("out", ["/dev/null/x", "/proc/emufuzz-out", "/dev/null"])
def test_an_unwritable_directory_is_refused(entry, out):
    done = fuzz(entry, "--cases", "10", "--out", out)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert out in done.stderr


def test_a_clean_campaign_exits_0_and_accounts_for_every_case(entry, tmp_path):
    done = fuzz(entry, "--cases", "3000", "--seed", "5", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stdout
    assert "3,000 cases = " in done.stdout
    assert "no new findings" in done.stdout
    summary = json.loads((tmp_path / "out" / "summary.json").read_bytes())
    assert summary["cases"] == summary["agreed"] + sum(summary["skipped"].values()) == 3000
    assert not list((tmp_path / "out" / "findings").iterdir())


def test_findings_exit_1_are_explained_and_known_the_next_time(entry, tmp_path):
    args = ("--cases", "6000", "--seed-bug", "adc-carry", "--out", tmp_path / "out")
    first = fuzz(entry, *args)
    assert first.returncode == 1
    files = sorted((tmp_path / "out" / "findings").iterdir())
    assert files
    assert "emulator" in first.stdout
    assert "oracle" in first.stdout
    assert f"emufuzz repro {tmp_path / 'out' / 'findings'}" in first.stdout
    saved = {path.name: path.read_bytes() for path in files}
    again = fuzz(entry, *args)
    assert again.returncode == 0
    assert "known ones seen again" in again.stdout
    assert {path.name: path.read_bytes() for path in files} == saved


def test_modes_restrict_the_campaign(entry, tmp_path):
    done = fuzz(entry, "--cases", "2000", "--modes", "real, vm86", "--out", tmp_path / "out")
    assert done.returncode == 0
    marker = json.loads((tmp_path / "out" / "campaign.json").read_bytes())
    assert marker["options"]["modes"] == ["real", "vm86"]


def test_seeded_bugs_are_listed(entry):
    done = fuzz(entry, "--seed-bug", "list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(BUGS)


def test_a_directory_that_fails_later_ends_the_campaign_in_one_line(entry, tmp_path, monkeypatch):
    """A full disk, played by a limit on the size of files that only findings exceed."""
    monkeypatch.setenv("EMUFUZZ_TEST_FILE_SIZE", "600")
    entry.with_name("limited.py").write_text(
        "import os, resource, signal\n"
        "size = int(os.environ['EMUFUZZ_TEST_FILE_SIZE'])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n" + RUN
    )
    result = fuzz(
        entry.with_name("limited.py"), "--cases", 20000, "--seed-bug", "adc-carry", "--out", tmp_path / "out"
    )
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "file too large" in result.stderr
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
