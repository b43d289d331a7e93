"""A campaign's findings, read one by one and checked: the file may come from anybody."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec

from emufuzz.case.errors import CaseError
from emufuzz.fuzz.finding import Finding
from emufuzz.fuzz.finding_json import finding_from_obj
from emufuzz.fuzz.store import Record, StoreError, StoreView
from emufuzz.fuzz.store.records import MAX_FINDING, STATES


class Loaded(NamedTuple):
    """A record of a campaign with its finding: the shrunk one if there is one.

    Attributes:
        name: The bucket's name.
        record: What the campaign has.
        document: The finding's JSON values.
        finding: The finding, without outcomes.
    """

    name: str
    record: Record
    document: dict[str, Any]
    finding: Finding

    def as_found(self) -> tuple[dict[str, Any], Finding]:
        """JSON values and finding before shrinking; StoreError as from `load`."""
        return _read(self.name, self.record, self.record.found)


def names_of(view: StoreView) -> list[str]:
    """Names of all findings, in the order in which they were found."""
    return [str(name) for (name,) in view.rows("SELECT name FROM findings ORDER BY batch, idx, name")]


def load(view: StoreView, name: str) -> Loaded:
    """The finding of that name.

    Raises:
        StoreError: There is none, or it is damaged.
    """
    record = view.record(name)
    if record.bucket.name != name:
        raise StoreError(f"{view.file}: finding {name!r} is damaged: its bucket is {record.bucket.name}")
    if record.state not in STATES:
        raise StoreError(f"{view.file}: finding {name} is damaged: unknown state {record.state!r}")
    document, finding = _read(name, record, record.best)
    return Loaded(name, record, document, finding)


def load_all(view: StoreView) -> Iterator[Loaded]:
    """All findings, in the order in which they were found; StoreError if one is damaged."""
    for name in names_of(view):
        yield load(view, name)


def _read(name: str, record: Record, text: str) -> tuple[dict[str, Any], Finding]:
    try:
        document = _decoded(text)
        finding = finding_from_obj(document)
    except (CaseError, msgspec.MsgspecError, RecursionError, UnicodeError) as error:
        raise StoreError(f"finding {name} is damaged: {error}") from error
    if finding.bucket != record.bucket:
        raise StoreError(f"finding {name} is damaged: what it says is a finding of {finding.bucket.name!r}")
    return document, finding


def _decoded(text: str) -> dict[str, Any]:
    if len(text) > MAX_FINDING:
        raise CaseError(f"{len(text)} characters, at most {MAX_FINDING} are taken")
    document = msgspec.json.decode(text)
    if not isinstance(document, dict):
        raise CaseError("expected a JSON object")
    return document
