"""Waiting for workers, and comparing what campaigns left; nothing here measures time."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

#: Seconds after which something that has to come counts as never coming.
PATIENCE = 300.0

#: What two campaigns with the same findings differ in: when, by whom, in which run.
_TABLES_ASIDE = ("runs", "history")
_COLUMNS_ASIDE = ("run",)


def until(condition, patience=PATIENCE):
    """Wait for a condition; AssertionError if it never comes."""
    end = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def until_idle(pool, count=None):
    """Poll until so many workers (default: all) can take a task; what they said until then."""
    said = []

    def there():
        said.extend(pool.poll(0.05))
        return len(pool.idle()) >= (pool.size if count is None else count)

    until(there)
    return said


def answer(pool):
    """The next thing that a worker says."""
    said = []

    def there():
        said.extend(pool.poll(0.1))
        return bool(said)

    until(there)
    assert len(said) == 1
    return said[0]


def alive(pid):
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def children(pid):
    """Ids of all processes below one."""
    below = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                stat = (entry / "stat").read_text()
            except OSError:
                continue
            below.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found, todo = [], [pid]
    while todo:
        todo.extend(below.get(todo[0], []))
        found.extend(below.get(todo.pop(0), []))
    return found


def contents(directory):
    """All rows of a campaign's tables that depend on its cases, and its exported findings."""
    db = sqlite3.connect(directory / "campaign.sqlite")
    tables = [name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
    found = {}
    for table in tables:
        if table not in _TABLES_ASIDE:
            names = [row[1] for row in db.execute(f"PRAGMA table_info({table})")]
            kept = ", ".join(name for name in names if name not in _COLUMNS_ASIDE)
            rows = db.execute(f"SELECT {kept} FROM {table}")  # noqa: S608 - the schema's own names
            found[table] = sorted(rows.fetchall(), key=repr)
    db.close()
    found["files"] = {path.name: path.read_bytes() for path in (directory / "findings").iterdir()}
    return found
