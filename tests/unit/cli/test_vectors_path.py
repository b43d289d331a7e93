"""`emufuzz vectors check --path fep`: what is equal, what is explained, what is neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from emufuzz.case.build import build_case
from emufuzz.case.delta import outcome_to_delta
from emufuzz.case.json import case_to_obj
from emufuzz.case.model import Case
from emufuzz.cli.main import run
from emufuzz.subject.flat import FlatSubject

ADD = build_case("prot32", bytes.fromhex("01d8"), id="add", rax=1, rbx=2)
STEPPED = build_case("prot32", bytes.fromhex("01d8"), id="stepped", flags=0x100, rax=1)
FPU = build_case("prot32", bytes.fromhex("d9e8"), id="fld1")


def vector(case: Case, **changes: Any) -> dict[str, Any]:
    (outcome,) = FlatSubject(events=True).run([case])
    return {"case": case_to_obj(case), "expect": outcome_to_delta(case, outcome) | changes}


def write(path: Path, *vectors: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(item) + "\n" for item in vectors), "utf-8")
    return str(path)


def test_the_table_counts_rules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "v.jsonl", vector(ADD), vector(STEPPED), vector(FPU))
    assert run(["vectors", "check", file, "--path", "fep"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["family", "total", "equal", "explained", "different"]
    assert lines[2:] == [
        ["alu", "2", "1", "1", "0"],
        ["notimpl", "1", "0", "1", "0"],
        ["all", "3", "1", "2", "0"],
        ["alu:", "1", "explained:", "single-step"],
        ["notimpl:", "1", "explained:", "decode-fault"],
    ]


def test_a_vector_that_differs_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "v.jsonl", vector(ADD, rip="0x1234"), vector(STEPPED))
    assert run(["vectors", "check", file, "--path", "fep"]) == 1
    out = capsys.readouterr().out
    assert "alu: differing: add\n" in out
    assert run(["vectors", "check", file, "--path", "fep", "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {
        "alu": {
            "total": 2, "equal": 0, "explained": 1, "different": 1, "rules": {"single-step": 1},
            "ids": ["add"],
        }
    }  # fmt: skip


def test_the_family_and_the_path_must_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path / "v.jsonl", vector(ADD))
    assert run(["vectors", "check", file, "--path", "fep", "--family", "sse"]) == 2
    assert "no vectors of that family in it" in capsys.readouterr().err
    assert run(["vectors", "check", file, "--path", "ud"]) == 2
    assert capsys.readouterr().err == "emufuzz: --path: ud is unknown; expected fep\n"
