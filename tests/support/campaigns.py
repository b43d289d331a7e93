"""Running the real command on campaigns, and what a campaign has found."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from emufuzz.fuzz.finding_json import digest
from emufuzz.fuzz.store import StoreView

ROOT = Path(__file__).parents[2]
#: A script that is the console script; worker processes import it, as they do the real one.
ENTRY = "import sys; from emufuzz.cli.main import run\nif __name__ == '__main__': sys.exit(run(sys.argv[1:]))"


def write_entry(directory: Path) -> Path:
    """The console script as a file."""
    path = directory / "emufuzz_entry.py"
    path.write_text(ENTRY)
    return path


def start(entry: Path, *args: object) -> subprocess.Popen[str]:
    """Start a command."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(entry), *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Wait for a command: its exit code and what it printed."""
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still are."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
    except OSError:
        return []
    return [int(word) for word in text.split()]


def found(directory: Path) -> dict[str, Any]:
    """Everything that a campaign has found and counted, but not when, by whom and with what."""
    view = StoreView(directory)
    try:
        records = view.records()
        return {
            "totals": view.totals(),
            "progress": view.progress(),
            "findings": {
                record.bucket: (record.batch, record.position, record.cases, digest(record.document))
                for record in records
            },
            "passes": {record.bucket: record.passes for record in records},
            "files": sorted(path.name for path in view.findings.iterdir()),
        }
    finally:
        view.close()


def batch_rows(directory: Path) -> list[tuple[int, int, int]]:
    """(batch, place, cases) of every merged part of a batch."""
    with sqlite3.connect(directory / "campaign.sqlite") as db:
        return db.execute("SELECT number, first, cases FROM batches ORDER BY number, first").fetchall()


def corpus_rows(directory: Path) -> list[tuple[Any, ...]]:
    """The cases of a guided campaign's corpus, with where they were found."""
    with sqlite3.connect(directory / "campaign.sqlite") as db:
        return db.execute("SELECT * FROM corpus ORDER BY id").fetchall()
