"""Reading a campaign, also one that is running."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from emufuzz.fuzz.accounting import Totals
from emufuzz.fuzz.cells import Cell, CellCount
from emufuzz.fuzz.config import CampaignConfig, ConfigError, config_of
from emufuzz.fuzz.finding import Bucket
from emufuzz.fuzz.store import schema
from emufuzz.fuzz.store.errors import StoreError
from emufuzz.fuzz.store.records import BY_NAME, IN_ORDER, Record, record_of

FILE: Final = "campaign.sqlite"
FINDINGS: Final = "findings"
#: What SQLite makes beside the file, behind its name.
SIDE_FILES: Final = ("-wal", "-shm", "-journal")
#: Seconds to wait for another process's transaction.
_BUSY: Final = 10.0
_SEPARATOR: Final = "\t"
_PAIRS: Final = "SELECT leaf, mode, sum(cases) FROM cells GROUP BY leaf, mode"
_CELLS: Final = "SELECT leaf, mode, cpl, outcome, path, cases, findings, batch, idx, code FROM cells"


#: Seconds above which a time is none: a century.
_LONGEST: Final = 100 * 366 * 86400
_ELAPSED: Final = (
    "SELECT number, first, cases, total, seconds "
    "FROM (SELECT number, first, cases, sum(cases) OVER (ORDER BY number, first) AS total FROM batches) "
    "JOIN elapsed USING(number, first) ORDER BY number, first"
)


class Merge(NamedTuple):
    """A part of a batch that was merged.

    Attributes:
        batch, first: Where its first case is.
        cases: How many it has.
        total: Cases of the campaign with it.
        seconds: How long all runs had taken then.
    """

    batch: int
    first: int
    cases: int
    total: int
    seconds: float


def key_of(parts: tuple[str, ...]) -> str:
    """A key of several parts as the table `counts` has it."""
    return _SEPARATOR.join(parts)


class StoreView:
    """A campaign directory, for reading."""

    def __init__(self, directory: Path) -> None:
        """Open it.

        Raises:
            StoreError: There is no campaign, or its file is damaged.
        """
        self.directory = directory
        self.findings = directory / FINDINGS
        self.file = directory / FILE
        if not self.file.is_file():
            what = "no such directory" if not directory.exists() else f"no campaign here (no {FILE} in it)"
            raise StoreError(f"{directory}: {what}")
        _refuse_links(self.file)
        with self.errors():
            self._db = self._connect()
            try:
                self._check()
            except BaseException:
                self._db.close()
                raise

    def _connect(self) -> sqlite3.Connection:
        """Open the file, also in a directory that cannot be written if there is no log beside it."""
        try:
            return self._opened("mode=ro")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF not in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN):
                raise
            log = self.file.with_name(f"{FILE}-wal")
            if log.exists() and log.stat().st_size:
                raise StoreError(
                    f"{self.file}: {log.name} cannot be read without writing to {self.directory}"
                ) from error
        return self._opened("mode=ro&immutable=1")

    def _opened(self, how: str) -> sqlite3.Connection:
        db = _careful(sqlite3.connect(f"{self.file.absolute().as_uri()}?{how}", uri=True, timeout=_BUSY))
        try:
            db.execute("PRAGMA schema_version").fetchall()
        except BaseException:
            db.close()
            raise
        return db

    @contextmanager
    def snapshot(self) -> Iterator[None]:
        """All that is read inside is of one moment, whatever a driver writes meanwhile."""
        with self.errors():
            self._db.execute("BEGIN")
        try:
            yield
        finally:
            self._db.execute("ROLLBACK")

    def _check(self) -> None:
        version = schema.check(self._db)
        if version == 0:
            raise schema.SchemaError("not a campaign: it is empty")
        if version != schema.VERSION:
            raise schema.SchemaError("made by an older emufuzz: `emufuzz fuzz --resume` brings it up to date")

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Errors of SQLite and of the file's contents as StoreError."""
        try:
            yield
        except (sqlite3.Error, schema.SchemaError, ConfigError, msgspec.MsgspecError) as error:
            raise StoreError(f"{self.file}: {error}") from error

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def rows(self, query: str, values: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with self.errors():
            return self._db.execute(query, values).fetchall()

    def meta(self, key: str) -> str:
        """A value of the campaign; StoreError if there is none."""
        rows = self.rows("SELECT value FROM meta WHERE key = ?", (key,))
        if not rows:
            raise StoreError(f"{self.file}: {key} is missing")
        return str(rows[0][0])

    def config(self) -> CampaignConfig:
        """What the campaign is."""
        with self.errors():
            return config_of(self.meta("config"))

    def budget(self) -> int | None:
        """Cases that the campaign shall have, None without a limit."""
        with self.errors():
            return msgspec.json.decode(self.meta("budget"), type=int | None)

    def totals(self) -> Totals:
        """The accounting of all merged batches.

        Raises:
            StoreError: It does not add up.
        """
        [(cases, agreed)] = self.rows("SELECT coalesce(sum(cases), 0), coalesce(sum(agreed), 0) FROM batches")
        totals = Totals(cases, agreed)
        for kind, key, n in self.rows("SELECT kind, key, n FROM counts"):
            if kind == "skipped":
                totals.skipped[key] = n
            elif kind == "results":
                first, _, second = key.partition(_SEPARATOR)
                totals.results[first, second] = n
            elif kind in ("verdicts", "fields"):
                oracle, leaf, why = (*key.split(_SEPARATOR, 2), "", "")[:3]
                getattr(totals, kind)[oracle, leaf, why] = n
        for leaf, mode, n in self.rows(_PAIRS):
            totals.add_cell(leaf, mode, n)
        for *bucket, n in self.rows("SELECT leaf, place, kind, verdict, cases FROM findings"):
            totals.bucket_cases[Bucket(*bucket)] = n
        if not totals.balanced:
            raise StoreError(f"{self.file}: damaged: its counts do not add up to {cases} cases")
        return totals

    def cells(self) -> dict[Cell, CellCount]:
        """What is counted of each cell that occurred."""
        return {
            Cell(*cell): CellCount(cases, findings, index, code, batch)
            for *cell, cases, findings, batch, index, code in self.rows(_CELLS)
        }

    def progress(self) -> tuple[int, int]:
        """(batch, place in it) of the first case that was not merged."""
        rows = self.rows(
            "SELECT number, max(first + cases) FROM batches GROUP BY number ORDER BY number DESC LIMIT 1"
        )
        return (rows[0][0], rows[0][1]) if rows else (0, 0)

    def seconds(self) -> float:
        """Seconds that all runs took."""
        [(seconds,)] = self.rows("SELECT coalesce(sum(seconds), 0.0) FROM runs")
        return self._time(seconds)

    def _time(self, seconds: float) -> float:
        """A time that the file has."""
        if not 0 <= seconds <= _LONGEST:
            raise StoreError(f"{self.file}: damaged: a time of {seconds} seconds")
        return float(seconds)

    def runs(self) -> list[dict[str, Any]]:
        """Every run: when, how long, with what, and how it ended."""
        rows = self.rows("SELECT started, seconds, workers, versions, state FROM runs ORDER BY id")
        with self.errors():
            return [
                {
                    "started": started,
                    "seconds": self._time(seconds),
                    "workers": workers,
                    "versions": msgspec.json.decode(versions, type=dict[str, str]),
                    "state": state,
                }
                for started, seconds, workers, versions, state in rows
            ]

    def history(self) -> list[tuple[int, float, int, int]]:
        """Growth: (cases, seconds, covered, findings) from time to time."""
        rows = self.rows("SELECT cases, seconds, covered, findings FROM history ORDER BY cases")
        return [(int(cases), self._time(seconds), int(c), int(f)) for cases, seconds, c, f in rows]

    def elapsed(self) -> list[Merge]:
        """When each part of a batch was merged, in their order; without those of which it is not known."""
        rows = self.rows(_ELAPSED)
        return [Merge(number, first, n, total, self._time(time)) for number, first, n, total, time in rows]

    def records(self) -> list[Record]:
        """All findings, in the order in which they were found."""
        return [record_of(row) for row in self.rows(IN_ORDER)]

    def record(self, name: str) -> Record:
        """The finding of a bucket; StoreError if there is none."""
        rows = self.rows(BY_NAME, (name,))
        if not rows:
            raise StoreError(f"{self.directory}: no finding {name!r}")
        return record_of(rows[0])

    def path_of(self, bucket: Bucket) -> Path:
        """Where a bucket's finding is exported."""
        return self.findings / f"{bucket.name}.json"


def _refuse_links(file: Path) -> None:
    """Raise StoreError if SQLite would read or write something that lies elsewhere."""
    for path in (file, *(file.with_name(file.name + suffix) for suffix in SIDE_FILES)):
        if path.is_symlink():
            raise StoreError(f"{path}: a link, which is not followed")


def _careful(db: sqlite3.Connection) -> sqlite3.Connection:
    """A connection to a file that may come from anybody."""
    db.execute("PRAGMA trusted_schema=OFF")
    db.execute("PRAGMA cell_size_check=ON")
    db.isolation_level = None  # transactions are explicit
    return db
