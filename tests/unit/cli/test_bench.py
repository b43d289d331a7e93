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
    assert result["raw_emu_start_us"] < result["oracle_us"] < result["campaign_us"]
