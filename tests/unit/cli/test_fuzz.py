"""`emufuzz fuzz`: exit codes, bad input in one line, what it prints and leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from emufuzz.fuzz.bugs import known_bugs
from emufuzz.fuzz.store import StoreView

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
    totals = StoreView(tmp_path / "out").totals()
    assert totals.balanced
    assert totals.cases == totals.agreed + totals.skipped_cases == 3000
    assert not list((tmp_path / "out" / "findings").iterdir())


def test_findings_exit_1_and_are_explained(entry, tmp_path):
    done = fuzz(entry, "--cases", "6000", "--seed-bug", "adc-carry", "--out", tmp_path / "out")
    assert done.returncode == 1
    assert list((tmp_path / "out" / "findings").iterdir())
    assert "emulator" in done.stdout
    assert "oracle" in done.stdout
    assert f"emufuzz repro {tmp_path / 'out' / 'findings'}" in done.stdout


def test_a_campaign_is_not_overwritten_but_resumed(entry, tmp_path):
    out = tmp_path / "out"
    begin = ("--cases", "3000", "--seed-bug", "adc-carry", "--modes", "real,prot64", "--out", out)
    assert fuzz(entry, *begin).returncode == 1
    files = {path.name: path.read_bytes() for path in (out / "findings").iterdir()}
    again = fuzz(entry, *begin)
    assert again.returncode == 2
    assert again.stderr == f"emufuzz: --out: {out}: holds a campaign; --resume goes on with it\n"
    over = fuzz(entry, "--resume", "--out", out)
    assert over.returncode == 2
    assert "all of its 3,000 cases are done; --cases N raises the budget" in over.stderr
    assert fuzz(entry, "--resume", "--cases", "9000", "--out", out).returncode in {0, 1}
    view = StoreView(out)
    assert view.totals().cases == view.budget() == 9000
    assert [run["state"] for run in view.runs()] == ["done", "done"]
    assert {name: (out / "findings" / name).read_bytes() for name in files} == files


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--seed", "4"], "--seed: the campaign has 1, not 4"),
        (["--modes", "real"], "--modes: the campaign has real,vm86, not real"),
        (["--subject", "kvm"], "--subject: the campaign has emulator, not kvm"),
        (["--seed-bug", "shr-of"], "--seed-bug: the campaign has none, not shr-of"),
        (["--cases", "10"], "--cases: the campaign has 600 cases already"),
    ],
)
def test_a_campaign_goes_on_as_what_it_is(small, entry, args, says):
    done = fuzz(entry, "--resume", *args, "--out", small)
    assert done.returncode == 2
    assert done.stderr == f"emufuzz: {says}\n"


@pytest.fixture(scope="module")
def small(entry, tmp_path_factory):
    """A campaign of 600 cases of two modes."""
    out = tmp_path_factory.mktemp("small") / "out"
    assert fuzz(entry, "--cases", "600", "--modes", "real, vm86", "--out", out).returncode == 0
    return out


def test_nothing_to_resume(entry, tmp_path):
    done = fuzz(entry, "--resume", "--out", tmp_path / "gone")
    assert done.returncode == 2
    assert done.stderr == f"emufuzz: --out: {tmp_path / 'gone'}: no such directory\n"
    assert not (tmp_path / "gone").exists()


def test_seeded_bugs_are_listed(entry):
    done = fuzz(entry, "--seed-bug", "list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(known_bugs())


def test_a_directory_that_fails_later_ends_the_campaign_in_one_line(entry, tmp_path, monkeypatch):
    """A full disk, played by a limit on the size of files, which the campaign's file comes to."""
    monkeypatch.setenv("EMUFUZZ_TEST_FILE_SIZE", "200000")
    entry.with_name("limited.py").write_text(
        "import os, resource, signal\n"
        "size = int(os.environ['EMUFUZZ_TEST_FILE_SIZE'])\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))\n" + RUN
    )
    begin = ("--cases", 20000, "--seed-bug", "adc-carry", "--oracles", "unicorn", "--out", tmp_path / "out")
    result = fuzz(entry.with_name("limited.py"), *begin)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert f"{tmp_path / 'out'}" in result.stderr
    assert "the campaign stopped, what it had is kept" in result.stderr
    assert StoreView(tmp_path / "out").totals().balanced
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []
