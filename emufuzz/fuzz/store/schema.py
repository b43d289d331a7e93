"""The tables of a campaign's file, and how older files become newer ones.

`PRAGMA user_version` is the number of steps that a file has gone through. A campaign's file may come
from anybody: what is in it besides these tables is refused.
"""

from __future__ import annotations

import sqlite3
from typing import Final

#: `PRAGMA application_id`: "emuf".
APPLICATION_ID: Final = 0x656D7566

_FIRST: Final = """
CREATE TABLE meta(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE runs(
    id       INTEGER PRIMARY KEY,
    started  TEXT NOT NULL,
    seconds  REAL NOT NULL,
    workers  TEXT NOT NULL,
    versions TEXT NOT NULL,
    state    TEXT NOT NULL
) STRICT;
CREATE TABLE batches(
    number      INTEGER NOT NULL,
    first       INTEGER NOT NULL,
    cases       INTEGER NOT NULL,
    agreed      INTEGER NOT NULL,
    skipped     INTEGER NOT NULL,
    in_findings INTEGER NOT NULL,
    run         INTEGER NOT NULL REFERENCES runs(id),
    PRIMARY KEY(number, first)
) STRICT;
CREATE TABLE counts(
    kind TEXT NOT NULL,
    key  TEXT NOT NULL,
    n    INTEGER NOT NULL,
    PRIMARY KEY(kind, key)
) STRICT;
CREATE TABLE findings(
    name    TEXT PRIMARY KEY,
    leaf    TEXT NOT NULL,
    place   TEXT NOT NULL,
    kind    TEXT NOT NULL,
    verdict TEXT NOT NULL,
    batch   INTEGER NOT NULL,
    idx     INTEGER NOT NULL,
    run     INTEGER NOT NULL REFERENCES runs(id),
    cases   INTEGER NOT NULL,
    state   TEXT NOT NULL,
    reason  TEXT NOT NULL,
    note    TEXT NOT NULL,
    found   TEXT NOT NULL,
    shrunk  TEXT,
    passes  TEXT
) STRICT;
"""

_HISTORY: Final = """
CREATE TABLE history(
    cases    INTEGER PRIMARY KEY,
    seconds  REAL NOT NULL,
    covered  INTEGER NOT NULL,
    findings INTEGER NOT NULL
) STRICT;
"""

#: What (leaf, mode) an older file has counted goes on as cells of which no more is known; workers' ends were
#: not counted in them.
_CELLS: Final = """
CREATE TABLE cells(
    leaf     TEXT NOT NULL,
    mode     TEXT NOT NULL,
    cpl      INTEGER NOT NULL,
    outcome  TEXT NOT NULL,
    path     TEXT NOT NULL,
    cases    INTEGER NOT NULL,
    findings INTEGER NOT NULL,
    batch    INTEGER NOT NULL,
    idx      INTEGER NOT NULL,
    code     BLOB NOT NULL,
    PRIMARY KEY(leaf, mode, cpl, outcome, path)
) STRICT, WITHOUT ROWID;
INSERT INTO cells
    SELECT substr(key, 1, instr(key, char(9)) - 1), substr(key, instr(key, char(9)) + 1), -1, '', '',
           n, 0, -1, -1, x''
    FROM counts WHERE kind = 'coverage';
INSERT INTO cells
    SELECT '', '', -1, '', '', left, 0, -1, -1, x''
    FROM (SELECT (SELECT coalesce(sum(cases), 0) FROM batches)
               - (SELECT coalesce(sum(cases), 0) FROM cells) AS left)
    WHERE left > 0;
DELETE FROM counts WHERE kind = 'coverage';
"""

#: The corpus of a guided campaign: cases in the order in which they were found, the pieces of their memory,
#: what was reached and in which batch first, and how often each case is picked in an epoch.
_CORPUS: Final = """
CREATE TABLE corpus(
    id     INTEGER PRIMARY KEY,
    batch  INTEGER NOT NULL,
    idx    INTEGER NOT NULL,
    cell   TEXT NOT NULL,
    arcs   INTEGER NOT NULL,
    judged INTEGER NOT NULL,
    data   BLOB NOT NULL
) STRICT;
CREATE TABLE pieces(name TEXT PRIMARY KEY, data BLOB NOT NULL) STRICT, WITHOUT ROWID;
CREATE TABLE features(number INTEGER PRIMARY KEY, batch INTEGER NOT NULL) STRICT;
CREATE TABLE epochs(epoch INTEGER PRIMARY KEY, energies BLOB NOT NULL) STRICT;
"""

#: How long all runs had taken when a part of a batch was merged. Of what an older emufuzz has merged it is
#: known where the history has just as many cases.
_ELAPSED: Final = """
CREATE TABLE elapsed(
    number  INTEGER NOT NULL,
    first   INTEGER NOT NULL,
    seconds REAL NOT NULL,
    PRIMARY KEY(number, first)
) STRICT, WITHOUT ROWID;
INSERT INTO elapsed
    SELECT number, first, seconds
    FROM (SELECT number, first, sum(cases) OVER (ORDER BY number, first) AS total FROM batches)
    JOIN history ON history.cases = total;
"""

#: Step n makes a file of version n + 1 from one of version n.
STEPS: Final = (_FIRST, _HISTORY, _CELLS, _CORPUS, _ELAPSED)
VERSION: Final = len(STEPS)


class SchemaError(Exception):
    """A file that is not a campaign's, or one of a newer emufuzz."""


def upgrade(db: sqlite3.Connection) -> None:
    """Bring an empty or older file to the present version, in one transaction.

    Raises:
        SchemaError: It is not a campaign's file, or a newer one.
    """
    version = check(db)
    if version == VERSION:
        return
    script = "".join(STEPS[version:])
    db.executescript(
        f"BEGIN IMMEDIATE; {script} PRAGMA application_id={APPLICATION_ID}; "
        f"PRAGMA user_version={VERSION}; COMMIT;"
    )


def check(db: sqlite3.Connection) -> int:
    """The version of a file, which has those tables and nothing else; 0 if it is empty.

    Raises:
        SchemaError: It is not a campaign's file, or a newer one.
    """
    [(application,)] = db.execute("PRAGMA application_id").fetchall()
    [(version,)] = db.execute("PRAGMA user_version").fetchall()
    objects = _objects(db)
    if not objects and not version:
        return 0
    if application != APPLICATION_ID:
        raise SchemaError("not a campaign")
    if not 0 < version <= VERSION:
        raise SchemaError(f"made by a newer emufuzz: version {version} of the file, this one knows {VERSION}")
    if objects != _expected(version):
        raise SchemaError("not a campaign: its tables are others")
    return int(version)


def _objects(db: sqlite3.Connection) -> dict[str, str]:
    """Tables, indices, views and triggers, as they were created."""
    rows = db.execute("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL").fetchall()
    return {str(name): str(sql) for name, sql in rows}


def _expected(version: int) -> dict[str, str]:
    made = sqlite3.connect(":memory:")
    try:
        made.executescript("".join(STEPS[:version]))
        return _objects(made)
    finally:
        made.close()
