"""Exit codes of `emufuzz repro` for findings, with a verdict that does not depend on today's port."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from emufuzz.cli.main import run
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import AGREE, FINDING, Difference, Verdict
from emufuzz.report import replay

CASE = json.loads((Path(__file__).parents[3] / "docs/examples/tzcnt-runs-as-bsf.json").read_text("utf-8"))
NOW = Difference("rax", "gpr", "0x1", "0x2")


def write_finding(path: Path, **changes: str) -> Path:
    difference = {"field": "rax", "kind": "gpr", "subject": "0x1", "oracle": "0x2", **changes}
    path.write_text(json.dumps({"case": CASE, "differences": [difference]}), "utf-8")
    return path


def set_verdict(monkeypatch: pytest.MonkeyPatch, kind: str, *differences: Difference) -> None:
    monkeypatch.setattr(replay, "judge", lambda *_: Verdict(kind, "", differences))


@pytest.mark.parametrize(
    ("kind", "differences", "code", "words"),
    [
        (FINDING, (NOW,), 1, "the same disagreement as recorded"),
        (FINDING, (NOW._replace(subject="0x9"),), 3, "a different disagreement"),
        (FINDING, (NOW, NOW._replace(field="rcx")), 3, "a different disagreement"),
        (AGREE, (), 0, "no longer a finding: all agree"),
    ],
)
def test_a_finding_is_same_different_or_gone(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    kind: str,
    differences: tuple[Difference, ...],
    code: int,
    words: str,
) -> None:
    set_verdict(monkeypatch, kind, *differences)
    assert run(["repro", str(write_finding(tmp_path / "f.json"))]) == code
    assert words in capsys.readouterr().out


def test_the_highest_code_of_several_files_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_verdict(monkeypatch, FINDING, NOW)
    same = str(write_finding(tmp_path / "same.json"))
    other = str(write_finding(tmp_path / "other.json", subject="0x7"))
    assert run(["repro", other, same]) == 3
    assert run(["repro", str(tmp_path / "gone.json"), same]) == 2


def test_crashes_are_the_same_by_what_was_raised(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    crash = Difference("subject", "crash", "KeyError: 5\nemulator/decode.py:10 f", "")
    finding = write_finding(
        tmp_path / "f.json", field="subject", kind="crash", subject="KeyError: 5\nx.py:1 g", oracle=""
    )
    set_verdict(monkeypatch, FINDING, crash)
    assert run(["repro", str(finding)]) == 1
    set_verdict(monkeypatch, FINDING, crash._replace(subject="KeyError: 6"))
    assert run(["repro", str(finding)]) == 3


def test_a_missing_oracle_is_exit_4(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def unavailable(_: object) -> None:
        raise OracleUnavailableError("unicorn 9.9 is installed, but only 2.1.4 is known")

    monkeypatch.setattr(replay.Replayer, "oracle", unavailable)
    assert run(["repro", str(write_finding(tmp_path / "f.json"))]) == 4
    error = capsys.readouterr().err
    assert error.startswith("emufuzz: ")
    assert "f.json: unicorn 9.9" in error


def test_an_endless_case_of_the_emulator_counts_as_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def endless(_self: object, _batch: object) -> None:
        while True:
            pass

    monkeypatch.setattr(replay, "HANG_SECONDS", 0.1)
    monkeypatch.setattr(replay.FlatSubject, "run", endless)
    from emufuzz.case.json import case_from_obj

    assert replay.Replayer().run_subject(case_from_obj(CASE)).hang
