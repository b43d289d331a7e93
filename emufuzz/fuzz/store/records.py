"""Findings as a campaign's file has them."""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import msgspec

from emufuzz.fuzz.finding import Bucket

#: What is said of a finding: by the campaign (`new`), by filters (`explained`, `duplicate`) and by people.
NEW: Final = "new"
KNOWN: Final = "known"
BUG: Final = "bug"
EXPLAINED: Final = "explained"
DUPLICATE: Final = "duplicate"
STATES: Final = (NEW, KNOWN, BUG, EXPLAINED, DUPLICATE)

#: Bytes of a finding's JSON above which it is not read.
MAX_FINDING: Final = 64 << 20


class Record(NamedTuple):
    """A finding of a campaign.

    Attributes:
        bucket: What it is deduplicated by.
        batch, position: Where its first case is.
        run: The run that found it.
        cases: How many cases fell into the bucket.
        state: One of STATES.
        reason: Why a filter put it into its state.
        note: What a person says of it.
        found: Its JSON as it was found.
        shrunk: Its JSON after shrinking; None before.
        passes: What shrinking did, as JSON: `passes`, `complete`, `reason`; None before.
    """

    bucket: Bucket
    batch: int
    position: int
    run: int
    cases: int
    state: str
    reason: str
    note: str
    found: str
    shrunk: str | None
    passes: str | None

    @property
    def best(self) -> str:
        """The JSON to show: shrunk if it is."""
        return self.found if self.shrunk is None else self.shrunk

    @property
    def document(self) -> dict[str, Any]:
        """The finding's JSON values.

        Raises:
            ValueError: It is no JSON object, or too long.
        """
        text = self.best
        if len(text) > MAX_FINDING:
            raise ValueError(f"{self.bucket.name}: {len(text)} bytes, at most {MAX_FINDING} are taken")
        value = msgspec.json.decode(text)
        if not isinstance(value, dict):
            raise ValueError(f"{self.bucket.name}: expected a JSON object")  # noqa: TRY004 - data, not a type
        return value


#: The columns of Record, in its order; a bucket's four come first.
SELECT: Final = (
    "SELECT leaf, place, kind, verdict, batch, idx, run, cases, state, reason, note, found, shrunk, passes "
    "FROM findings "
)
IN_ORDER: Final = SELECT + "ORDER BY batch, idx, name"
BY_NAME: Final = SELECT + "WHERE name = ?"


def record_of(row: tuple[Any, ...]) -> Record:
    """A row of SELECT as a record."""
    return Record(Bucket(*row[:4]), *row[4:])
