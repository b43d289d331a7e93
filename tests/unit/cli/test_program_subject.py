"""`--subject cmd:PROGRAM`: campaigns of somebody's own emulator, and what their findings may start."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Run = Callable[..., "CompletedProcess[bytes]"]

PORT = f"cmd:{sys.executable} {Path(__file__).parents[2] / 'support' / 'port_program.py'}"
BROKEN = f"{PORT} broken"
FEW = ("--cases", "400", "--modes", "prot32", "--workers", "local:1")


def one_line(done: CompletedProcess[bytes], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert done.stderr.count(b"\n") == 1
    assert all(word in done.stderr.decode() for word in words)


@pytest.fixture
def campaign(run: Run, tmp_path: Path) -> Path:
    """Findings of a program that has INC and DEC wrong."""
    out = tmp_path / "campaign"
    done = run("fuzz", "--subject", BROKEN, "--out", str(out), *FEW)
    assert done.returncode == 1, done.stderr
    return out


def test_a_program_that_does_as_the_port_has_no_findings(run: Run, tmp_path: Path) -> None:
    done = run("fuzz", "--subject", PORT, "--out", str(tmp_path / "out"), *FEW)
    assert done.returncode == 0, done.stderr
    assert b"cmd:port" in done.stdout + done.stderr or b"no new findings" in done.stdout


def test_what_a_program_does_wrong_is_found_and_reproduced(run: Run, campaign: Path) -> None:
    files = sorted((campaign / "findings").iterdir())
    assert files
    assert {file.name.split("-")[0] for file in files} <= {"fe_0", "fe_1", "ff_0", "ff_1"}
    finding = json.loads(files[0].read_bytes())
    assert {d["field"] for d in finding["differences"]} == {"rflags"}
    assert finding["versions"]["subject"] == "cmd:port"
    again = run("repro", "--subject", BROKEN, str(files[0]))
    assert (again.returncode, b"unicorn contradicts cmd:port on rflags" in again.stdout) == (1, True)
    right = run("repro", "--subject", PORT, str(files[0]))
    assert (right.returncode, b"no longer a finding" in right.stdout) == (0, True)

    # A file, and a directory, may come from anybody: they do not decide which program runs.
    one_line(run("repro", str(files[0])), 2, "cmd:port", "--subject has to name it")
    one_line(run("shrink", str(files[0])), 2, "cmd:port", "only its campaign shrinks it")
    resume = ("fuzz", "--resume", "--cases", "500", "--out", str(campaign))
    one_line(run(*resume), 2, "is a program", "--subject has to name it")
    shown = run("findings", "show", str(campaign), files[0].stem).stdout.decode()
    assert "not run again" in shown
    assert f"--subject '{BROKEN}'" in shown


def test_programs_that_do_not_start_leave_nothing_behind(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    one_line(run("fuzz", "--subject", "cmd:/no/such/program", "--out", str(out), *FEW), 4, "does not start")
    one_line(run("fuzz", "--subject", "cmd:", "--out", str(out), *FEW), 2, "--subject", "cmd:PROGRAM")
    assert not out.exists()
    one_line(run("repro", "--subject", "emulator", "-", data=b"{}"), 2, "--subject", "cmd:PROGRAM")


def test_a_seeded_bug_is_one_of_the_port(run: Run, tmp_path: Path) -> None:
    bug = run("fuzz", "--seed-bug", "list").stdout.split()[0].decode()
    done = run("fuzz", "--subject", PORT, "--seed-bug", bug, "--out", str(tmp_path / "out"), *FEW)
    one_line(done, 2, "--seed-bug", "not under test")
