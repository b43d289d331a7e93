from __future__ import annotations

from pathlib import Path

import pytest

from emufuzz.case.json import case_from_json
from emufuzz.cli.main import run
from emufuzz.fuzz.handlers import rules


def test_all_explained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert run(["handlers", "--cases", "300", "--seed", "4", "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "shadow-event" in text
    assert "unexplained      0" in text
    assert not out.exists()


def test_an_unexplained_case_is_kept_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rules, "ENDINGS", ())
    assert run(["handlers", "--cases", "100", "--seed", "4", "--out", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    kept = sorted(tmp_path.iterdir())
    assert kept
    assert str(kept[0]) in text
    assert "more" in text or len(kept) <= 20
    for path in kept:
        plain, prefixed = map(case_from_json, path.read_bytes().splitlines())
        assert (plain.path, prefixed.path) == ("exit", "fep")
        assert prefixed.code.endswith(plain.code)


@pytest.mark.parametrize("cases", ["0", "-5", str((1 << 32) + 1)])
def test_a_number_of_cases_that_makes_no_sense(cases: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["handlers", "--cases", cases]) == 2
    assert capsys.readouterr().err == f"emufuzz: --cases: must be 1 to 4294967296, got {cases}\n"


def test_a_directory_that_cannot_be_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rules, "ENDINGS", ())
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    assert run(["handlers", "--cases", "100", "--seed", "4", "--out", str(blocked)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
