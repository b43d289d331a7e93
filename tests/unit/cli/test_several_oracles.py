"""Campaigns and replays with several oracles, end to end."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.json import case_to_json, case_to_obj

Run = Callable[..., subprocess.CompletedProcess[bytes]]

SAMPLE = Path(__file__).parents[3] / "docs" / "samples" / "incdec.py"


@pytest.fixture
def wrong_oracle(tmp_path: Path) -> str:
    """The sample program with a mistake: INC and DEC set CF."""
    program = tmp_path / "wrong.py"
    program.write_text(SAMPLE.read_text().replace("flags |= ZF if", "flags |= CF\n    flags |= ZF if"))
    return f"cmd:{sys.executable} {program}"


def test_a_finding_of_another_oracle_is_reproduced_with_one_command(
    run: Run, tmp_path: Path, wrong_oracle: str
) -> None:
    spec = f"unicorn,{wrong_oracle}"
    done = run("fuzz", "--cases", "20000", "--modes", "prot64", "--oracles", spec, "--out", "c")
    assert done.returncode == 1, done.stderr
    findings = sorted((tmp_path / "c" / "findings").iterdir())
    finding = json.loads(findings[0].read_text())
    assert (
        finding["sentence"] == "the oracles are split: cmd:incdec against emulator, with which unicorn agrees"
    )
    assert finding["versions"]["oracles"] == spec
    again = run("repro", findings[0], "--oracles", spec)
    assert again.returncode == 1, again.stderr
    text = again.stdout.decode()
    assert "the same disagreement as recorded" in text
    assert "cmd:incdec" in text


def test_a_file_does_not_decide_which_program_runs(run: Run, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    program = tmp_path / "program.sh"
    program.write_text(f"#!/bin/sh\ntouch {ran}\n")
    program.chmod(0o755)
    case = case_to_obj(build_case("prot64", b"\x90"))
    versions = {"oracles": f"unicorn,cmd:{program}"}
    (tmp_path / "f.json").write_text(json.dumps({"case": case, "differences": [], "versions": versions}))
    done = run("repro", "f.json")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (2, b"", 1)
    assert b"--oracles" in done.stderr
    assert not ran.exists()


def test_rules_say_what_they_demand(run: Run, tmp_path: Path) -> None:
    sti_again = build_case("prot64", b"\xfb", flags=0x200)
    (tmp_path / "case.json").write_bytes(case_to_json(sti_again))
    text = run("repro", "case.json", "--oracles", "unicorn,rules").stdout.decode()
    assert "rules" in text
    assert "interruptibility" in text


def test_unknown_oracles_are_refused_in_one_line(run: Run, tmp_path: Path) -> None:
    for arguments in (("fuzz", "--oracles", "unicorn,delphi"), ("repro", "-", "--oracles", "delphi")):
        done = run(*arguments)
        assert (done.returncode, done.stderr.count(b"\n")) == (2, 1)
        assert b"delphi" in done.stderr
    done = run("fuzz", "--oracles", "rules")
    assert (done.returncode, b"unicorn has to be among them" in done.stderr) == (2, True)
