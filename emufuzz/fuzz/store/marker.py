"""Marks on a campaign's findings, also while it runs.

A driver holds the lock of its campaign for as long as it runs, so marks do not need it: each is one
short transaction, and SQLite has its writers wait for each other. What a person says stands: filters
change only findings that carry no such mark, and look in the same transaction.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Sequence
from typing import Any, Final

from emufuzz.fuzz.store.errors import StoreError
from emufuzz.fuzz.store.records import BUG, KNOWN, NEW, STATES
from emufuzz.fuzz.store.view import StoreView, _careful

#: The reason of a state that a person has put a finding into.
BY_HAND: Final = "marked by hand"
#: States that people choose.
MARKS: Final = (NEW, KNOWN, BUG)
#: Characters of a note.
MAX_NOTE: Final = 4096
#: Seconds to wait for the driver's transaction.
_BUSY: Final = 30.0


class StoreMarker(StoreView):
    """A campaign directory, for changing the states of findings."""

    def _connect(self) -> sqlite3.Connection:
        """Open the file for writing."""
        db = sqlite3.connect(f"{self.file.absolute().as_uri()}?mode=rw", uri=True, timeout=_BUSY)
        return _careful(db)

    def mark(self, names: Sequence[str], state: str, note: str | None = None) -> None:
        """Mark findings, all of them or none.

        Args:
            names: Names of their buckets.
            state: One of MARKS.
            note: What to say of them, at most MAX_NOTE characters; None leaves what is said.

        Raises:
            StoreError: There is no such finding, or the file cannot be written.
        """
        if state not in MARKS:
            raise ValueError(f"{state!r} is no mark")
        if note is not None and len(note) > MAX_NOTE:
            raise ValueError(f"a note of {len(note)} characters, at most {MAX_NOTE} are taken")
        statement = "UPDATE findings SET state = ?, reason = ?, note = coalesce(?, note) WHERE name = ?"
        self._each(names, statement, lambda name: (state, BY_HAND, note, name))

    def unmark(self, names: Sequence[str], note: str | None = None) -> None:
        """Take marks away: the findings are new, and filters may judge them. Errors as of `mark`."""
        statement = "UPDATE findings SET state = ?, reason = '', note = coalesce(?, note) WHERE name = ?"
        self._each(names, statement, lambda name: (NEW, note, name))

    def judged(self, name: str, state: str, reason: str) -> bool:
        """Put a finding into the state that filters say, unless a person has marked it.

        Returns:
            Whether the finding has it now.

        Raises:
            StoreError: The file cannot be written.
        """
        if state not in STATES:
            raise ValueError(f"unknown state {state!r}")
        statement = "UPDATE findings SET state = ?, reason = ? WHERE name = ? AND reason <> ?"
        with self.errors():
            return self._db.execute(statement, (state, reason, name, BY_HAND)).rowcount == 1

    def _each(self, names: Sequence[str], statement: str, values: Callable[[str], tuple[Any, ...]]) -> None:
        """Run a statement for each finding, or for none of them."""
        with self.errors():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                for name in dict.fromkeys(names):
                    self._update(statement, values(name), name)
                self._db.execute("COMMIT")
            except BaseException:
                self._db.execute("ROLLBACK")
                raise

    def _update(self, statement: str, values: tuple[Any, ...], name: str) -> None:
        if self._db.execute(statement, values).rowcount != 1:
            raise StoreError(f"{self.directory}: no finding {name!r}")
