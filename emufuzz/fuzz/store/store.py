"""Writing a campaign: one transaction per merged batch, so that a kill loses and doubles nothing.

A batch's counts, its new findings and the place where the campaign goes on change together. Exported
files are copies: what a kill left out is exported again when the campaign is opened.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Self

import msgspec

from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.cells import CellKey, Tally
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.files import reason_of, write_atomically
from emufuzz.fuzz.finding import Bucket, Finding
from emufuzz.fuzz.finding_json import encode, finding_to_obj
from emufuzz.fuzz.guided.guide import Growth
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.store import schema
from emufuzz.fuzz.store.corpus import growth_changes
from emufuzz.fuzz.store.errors import StoreError
from emufuzz.fuzz.store.lock import LOCK, DirectoryLock
from emufuzz.fuzz.store.records import NEW, STATES, Record
from emufuzz.fuzz.store.view import FILE, FINDINGS, StoreView, _careful, key_of

#: Names that a directory may have before there is a campaign in it.
_OURS: Final = frozenset((LOCK, FINDINGS))
_BUSY: Final = 10.0
_BEGIN: Final = "INSERT INTO runs(started, seconds, workers, versions, state) VALUES(?, 0, ?, ?, 'running')"

_ADD_CELL: Final = (
    "INSERT INTO cells VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE "
    "SET cases = cases + excluded.cases, findings = findings + excluded.findings"
)


class Store(StoreView):
    """A campaign directory, for its driver, of which there is one."""

    def __init__(self, directory: Path) -> None:
        """Open a campaign that exists.

        Raises:
            StoreError: There is none, it is damaged, or somebody else runs it.
        """
        self._run = 0
        self._earlier = 0.0  # seconds of the runs before
        self._versions: dict[str, str] = {}
        if not (directory / FILE).is_file():
            super().__init__(directory)  # says what is missing
        self._lock = DirectoryLock(directory)
        try:
            super().__init__(directory)
            self._export_missing()
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def create(cls, directory: Path, config: CampaignConfig, budget: int | None) -> Self:
        """Make a campaign in a new or empty directory.

        Raises:
            StoreError: There is something already, or it cannot be written.
        """
        _check_free(directory)
        try:
            (directory / FINDINGS).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(f"{directory}: {reason_of(error)}") from error
        lock = DirectoryLock(directory)
        try:
            _make(directory / FILE, config, budget)
        finally:
            lock.release()
        return cls(directory)

    def _connect(self) -> sqlite3.Connection:
        db = sqlite3.connect(f"{self.file.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY)
        _careful(db)
        db.execute("PRAGMA foreign_keys=ON")
        return db

    def _check(self) -> None:
        """Bring the file up to date, and make sure that it is whole."""
        if schema.check(self._db) == 0:
            raise schema.SchemaError("not a campaign: it is empty")
        schema.upgrade(self._db)
        [(state,)] = self._db.execute("PRAGMA quick_check(1)").fetchall()
        if state != "ok":
            raise StoreError(f"{self.file}: damaged: {state}")
        self._db.execute("PRAGMA journal_mode=WAL")
        self._db.execute("PRAGMA synchronous=NORMAL")
        if self.findings.is_symlink() or (self.findings.exists() and not self.findings.is_dir()):
            raise StoreError(f"{self.findings}: not a directory of this campaign")

    def close(self) -> None:
        """Close the file and give the lock up."""
        super().close()
        self._lock.release()

    def _change(self, changes: Iterable[tuple[str, tuple[Any, ...]]]) -> None:
        """Make several changes, or none of them."""
        with self.errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for statement, values in changes:
                    self._db.execute(statement, values)
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    def begin(self, workers: str, versions: dict[str, str]) -> None:
        """Record that a run starts, and end those that did not say how they ended."""
        self._versions = versions
        started = datetime.now(UTC).isoformat(timespec="seconds")
        self._change(
            [
                ("UPDATE runs SET state = 'killed' WHERE state = 'running'", ()),
                (_BEGIN, (started, workers, msgspec.json.encode(versions).decode())),
            ]
        )
        [(self._run,)] = self.rows("SELECT max(id) FROM runs")
        self._earlier = self.seconds()

    def set_budget(self, cases: int | None) -> None:
        """Change how many cases the campaign shall have."""
        text = msgspec.json.encode(cases).decode()
        self._change([("UPDATE meta SET value = ? WHERE key = 'budget'", (text,))])

    def merge(
        self,
        result: BatchResult,
        first: int,
        cases: int,
        fresh: list[Finding],
        seconds: float,
        growth: Growth | None = None,
    ) -> None:
        """Add what became of a batch's cases from place `first` on.

        Args:
            result: The result.
            first: The place of its first case.
            cases: How many places it covers.
            fresh: Findings of buckets that did not exist.
            seconds: How long this run has taken so far.
            growth: What it adds to the corpus of a guided campaign.
        """
        skipped, found = sum(result.skipped.values()), sum(result.bucket_cases.values())
        row = (result.number, first, cases, result.agreed, skipped, found, self._run)
        new = {finding.bucket for finding in fresh}
        changes: list[tuple[str, tuple[Any, ...]]] = [
            ("INSERT INTO batches VALUES(?, ?, ?, ?, ?, ?, ?)", row),
            ("INSERT INTO elapsed VALUES(?, ?, ?)", (result.number, first, self._earlier + seconds)),
            ("UPDATE runs SET seconds = ? WHERE id = ?", (seconds, self._run)),
            *(_count("skipped", (reason,), n) for reason, n in result.skipped.items()),
            *(_cell(key, result.number, tally) for key, tally in result.cells.items()),
            *(_count("results", key, n) for key, n in result.results.items()),
            *(_count("verdicts", key, n) for key, n in result.verdicts.items()),
            *(_count("fields", key, n) for key, n in result.fields.items()),
            *(self._insert(finding, result.bucket_cases[finding.bucket]) for finding in fresh),
            *(
                ("UPDATE findings SET cases = cases + ? WHERE name = ?", (n, bucket.name))
                for bucket, n in result.bucket_cases.items()
                if bucket not in new
            ),
            *(growth_changes(growth) if growth else ()),
        ]
        self._change(changes)
        for finding in fresh:
            self._export(finding.bucket, encode(finding_to_obj(finding, self._versions)))

    def _insert(self, finding: Finding, cases: int) -> tuple[str, tuple[Any, ...]]:
        text = encode(finding_to_obj(finding, self._versions)).decode()
        places = (finding.batch, finding.index, self._run, cases)
        return (
            "INSERT INTO findings VALUES(?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (finding.bucket.name, *finding.bucket, *places, NEW, "", "", text, None, None),
        )

    def grow(self, cases: int, seconds: float, covered: int, findings: int) -> None:
        """Record how far the campaign is; `seconds` are those of all runs."""
        statement = "INSERT OR REPLACE INTO history VALUES(?, ?, ?, ?)"
        self._change([(statement, (cases, seconds, covered, findings))])

    def save_shrunk(self, bucket: Bucket, shrunk: Shrunk) -> None:
        """Keep what a finding was shrunk to, and what shrinking did."""
        data = encode(finding_to_obj(shrunk.finding, self._versions))
        passes = msgspec.json.encode(
            {"passes": shrunk.passes, "complete": shrunk.complete, "reason": shrunk.reason}
        )
        statement = "UPDATE findings SET shrunk = ?, passes = ? WHERE name = ?"
        self._change([(statement, (data.decode(), passes.decode(), bucket.name))])
        self._export(bucket, data)

    def not_shrunk(self, bucket: Bucket, reason: str) -> None:
        """Record why a finding cannot be shrunk."""
        passes = msgspec.json.encode({"passes": [], "complete": False, "reason": reason}).decode()
        self._change([("UPDATE findings SET passes = ? WHERE name = ?", (passes, bucket.name))])

    def mark(self, names: Iterable[str], state: str, reason: str = "", note: str | None = None) -> None:
        """Put findings into a state; a note of None leaves theirs.

        Raises:
            StoreError: There is no such finding.
        """
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        chosen = [self.record(name).bucket.name for name in names]
        statement = "UPDATE findings SET state = ?, reason = ?, note = coalesce(?, note) WHERE name = ?"
        self._change([(statement, (state, reason, note, name)) for name in chosen])

    def finish(self, state: str, seconds: float) -> None:
        """Record how the run ended."""
        self._change([("UPDATE runs SET state = ?, seconds = ? WHERE id = ?", (state, seconds, self._run))])

    def unshrunk(self) -> list[Record]:
        """Findings that nobody has tried to shrink."""
        return [record for record in self.records() if record.passes is None]

    def _export(self, bucket: Bucket, data: bytes) -> None:
        path = self.path_of(bucket)
        try:
            write_atomically(path, data)
        except OSError as error:
            raise StoreError(f"{path}: {reason_of(error)}") from error

    def _export_missing(self) -> None:
        """Export what a kill kept from being exported, and remove what it left half-written."""
        self.findings.mkdir(exist_ok=True)
        for left in (*self.directory.glob(".*.tmp"), *self.findings.glob(".*.tmp")):
            left.unlink(missing_ok=True)
        for record in self.records():
            data = record.best.encode()
            if not _is(self.path_of(record.bucket), data):
                self._export(record.bucket, data)


def _is(path: Path, data: bytes) -> bool:
    """Whether a file has these contents."""
    try:
        return path.stat().st_size == len(data) and path.read_bytes() == data
    except OSError:
        return False


def _count(kind: str, key: tuple[str, ...], n: int) -> tuple[str, tuple[Any, ...]]:
    return (
        "INSERT INTO counts VALUES(?, ?, ?) ON CONFLICT(kind, key) DO UPDATE SET n = n + excluded.n",
        (kind, key_of(key), n),
    )


def _cell(key: CellKey, batch: int, tally: Tally) -> tuple[str, tuple[Any, ...]]:
    """Batches are merged in order, so that the first case that is known stays the first one."""
    return _ADD_CELL, (*key, tally.cases, tally.findings, batch, tally.index, tally.code)


def _check_free(directory: Path) -> None:
    """Raise StoreError unless a campaign can be made there."""
    try:
        entries = list(os.scandir(directory)) if directory.exists() else []
    except OSError as error:
        raise StoreError(f"{directory}: {reason_of(error)}") from error
    names = {entry.name for entry in entries}
    if FILE in names:
        raise StoreError(f"{directory}: holds a campaign; --resume goes on with it")
    if names - _OURS or any(entry.is_symlink() for entry in entries):
        raise StoreError(f"{directory}: not empty and not a campaign directory (no {FILE} in it)")


def _make(file: Path, config: CampaignConfig, budget: int | None) -> None:
    """Make the file whole before it has its name."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        db = sqlite3.connect(temporary)
        try:
            schema.upgrade(db)
            values = {"config": config.to_json(), "budget": msgspec.json.encode(budget).decode()}
            with db:
                db.executemany("INSERT INTO meta VALUES(?, ?)", values.items())
        finally:
            db.close()
        temporary.replace(file)
    except (sqlite3.Error, OSError) as error:
        temporary.unlink(missing_ok=True)
        why = reason_of(error) if isinstance(error, OSError) else str(error)
        raise StoreError(f"{file}: {why}") from error
