from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[3]


def commands() -> list[str]:
    """The set-up commands: shell blocks of the README."""
    return re.findall(r"```sh\n(.*?)\n```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)


def test_readme_has_exactly_two_setup_commands_of_one_line() -> None:
    assert len(commands()) == 2
    assert all("\n" not in command for command in commands())


def test_ci_runs_the_second_setup_command() -> None:
    lines = (ROOT / ".ci" / "run").read_text("utf-8").splitlines()
    assert lines[-1] == commands()[1]


def test_files_named_in_the_setup_commands_exist() -> None:
    assert [name for name in re.findall(r"docs/\S+\.json", commands()[0]) if not (ROOT / name).exists()] == []
    assert "docs/examples/" in commands()[0]
