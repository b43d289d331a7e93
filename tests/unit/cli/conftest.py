"""The real command line in a subprocess, in a fresh directory."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
EMUFUZZ = [sys.executable, "-c", "from emufuzz.cli.main import main; main()"]

Run = Callable[..., subprocess.CompletedProcess[bytes]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run(*arguments, data=b"")`: exit code, stdout and stderr of `emufuzz` with them."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("COLUMNS", "80")

    def call(*args: str | Path, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
        command = [*EMUFUZZ, *map(str, args)]
        return subprocess.run(
            command, cwd=tmp_path, input=data, capture_output=True, timeout=120, check=False
        )

    return call
