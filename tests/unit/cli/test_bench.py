from __future__ import annotations

import json

import pytest

from emufuzz.cli import bench
from emufuzz.cli.main import run
from emufuzz.fuzz.bench import MIN_ROUNDS

KEYS = ("raw_emu_start_us", "oracle_us", "emulator_us", "campaign_us", "campaign_over_oracle")


def test_json_has_positive_medians_and_ratios(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "QUICK_SECONDS", 0.0)
    assert run(["bench", "--quick", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert all(result[key] > 0 for key in KEYS)
    assert result["rounds"] == MIN_ROUNDS
    assert 1 < result["guided_over_unfed"] < 2
    assert {"rules", "exits"} <= set(result["panel"])
    assert result["panel_over_campaign"] > 1
    assert result["raw_emu_start_us"] < result["oracle_us"] < result["campaign_us"]


def test_workers_are_held_against_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--workers", "2", "--cases", "8192", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [each["workers"] for each in (*result["one"], *result["several"])] == [1, 2]
    assert all(each["cases"] == 8192 for each in (*result["one"], *result["several"]))
    assert all(each["rate"] > 0 for each in (*result["one"], *result["several"]))
    assert all(each["late_mib"] > 20 for each in (*result["one"], *result["several"]))
    assert result["speedup"] == round(result["several"][0]["rate"] / result["one"][0]["rate"], 3)
    assert result["growth"] > -1


def test_a_subject_that_there_is_not_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["bench", "--workers", "2", "--subject", "none"]) == 2
    assert capsys.readouterr().err.startswith("emufuzz: --subject: ")
