"""What `emufuzz vouch` has counted so far, in a file: a long run can be ended, and gone on with."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, Final

import emufuzz
from emufuzz.fuzz.files import write_atomically
from emufuzz.fuzz.vouched import Vouched

_FORMAT: Final = 1
_MAX_SIZE: Final = 64 << 20


class VouchFileError(ValueError):
    """The file is none of these, or of another run; the message says what is wrong, with the field."""


def load(path: Path, run: dict[str, Any]) -> tuple[int, Vouched]:
    """(batches that are counted, the counts); nothing of either if there is no file.

    Args:
        path: From `save`.
        run: What the counts depend on, as JSON values.

    Raises:
        VouchFileError: It cannot be gone on with.
        OSError: It cannot be read.
    """
    if not path.exists():
        return 0, Vouched()
    fields = _fields(path)
    if fields.get("format") != _FORMAT:
        raise VouchFileError(f"format: {fields.get('format')!r} instead of {_FORMAT}")
    wanted = _described(run)
    given = fields.get("run")
    for name, value in wanted.items():
        if not isinstance(given, dict) or given.get(name) != value:
            raise VouchFileError(f"run.{name}: it is that of another run")
    batches = fields.get("batches")
    if not isinstance(batches, int) or isinstance(batches, bool) or batches < 0:
        raise VouchFileError("batches: not a number of batches")
    return batches, _counts(fields.get("counts"))


def save(path: Path, run: dict[str, Any], batches: int, total: Vouched) -> None:
    """Write the counts of the first `batches` batches; the file is whole at any time.

    Raises:
        OSError: It could not be written.
    """
    counts = {
        name: sorted(
            [list(key) if isinstance(key, tuple) else [key], count] for key, count in counter.items()
        )
        for name, counter in _counters(total).items()
    }
    fields = {"format": _FORMAT, "run": _described(run), "batches": batches, "counts": counts}
    write_atomically(path, json.dumps(fields).encode())


def _rows(counter: Counter[Any]) -> list[list[Any]]:
    return sorted([list(key) if isinstance(key, tuple) else [key], count] for key, count in counter.items())


def _described(run: dict[str, Any]) -> dict[str, Any]:
    return {**run, "version": emufuzz.__version__}


def _counters(total: Vouched) -> dict[str, Counter[Any]]:
    return {name: getattr(total, name) for name in Vouched.__slots__}


def _fields(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _MAX_SIZE:
        raise VouchFileError(f"larger than {_MAX_SIZE} bytes")
    try:
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise VouchFileError("no JSON") from error
    if not isinstance(fields, dict):
        raise VouchFileError("no JSON object")
    return fields


def _counts(given: Any) -> Vouched:
    total = Vouched()
    for name, counter in _counters(total).items():
        rows = given.get(name) if isinstance(given, dict) else None
        if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
            raise VouchFileError(f"counts.{name}: not a list of keys and counts")
        for key, count in rows:
            counter[key[0] if len(key) == 1 else tuple(key)] += count
    return total


def _is_row(row: Any) -> bool:
    if not isinstance(row, list) or len(row) != 2:
        return False
    key, count = row
    names = isinstance(key, list) and bool(key) and all(isinstance(part, str) for part in key)
    return names and isinstance(count, int) and not isinstance(count, bool) and count >= 0
