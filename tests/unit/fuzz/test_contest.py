"""Generators held against each other."""

from __future__ import annotations

import json

import pytest

from emufuzz.cli.main import run
from emufuzz.fuzz.bugs import BUGS
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.contest import contest
from emufuzz.fuzz.schedule import BATCH_SIZE


def test_all_seeded_bugs_are_there_at_once_and_none_afterwards():
    score = contest(CampaignConfig(seed=2, modes=("prot32",)), 0.01, bugs=True)
    assert score.cases == BATCH_SIZE
    assert 3 <= score.bugs <= len(BUGS)
    assert score.quirks > 0
    assert score.arcs > 500
    clean = contest(CampaignConfig(seed=2, modes=("prot32",)), 0.01)
    assert (clean.bugs, clean.findings) == (0, 0)


def test_the_command_gives_a_line_per_generator_and_seed(capsys):
    args = ["bench", "--generators", "structured,guided", "--seeds", "1", "--seconds", "0.1", "--json"]
    assert run(args) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["generator"] for line in lines] == ["structured", "guided"]
    assert all(line["cases"] >= BATCH_SIZE and line["seconds"] >= 0.1 for line in lines)


@pytest.mark.parametrize(
    ("option", "args"), [("--subject", ("guided", "--subject", "cpu")), ("--generator", ("x",))]
)
def test_unknown_names_are_bad_input(capsys, option, args):
    assert run(["bench", "--generators", *args]) == 2
    assert option in capsys.readouterr().err
