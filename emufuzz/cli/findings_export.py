"""`emufuzz findings export`: findings as JSON, one file each or one line each."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from emufuzz.cli.errors import InputError
from emufuzz.fuzz.files import reason_of, write_atomically
from emufuzz.fuzz.finding_json import encode
from emufuzz.fuzz.store import StoreView
from emufuzz.fuzz.triage.loaded import Loaded, load, names_of

STDOUT: Final = "-"
#: What the name of a file of JSON lines ends in.
LINES: Final = ".jsonl"
#: Characters of a file's name; a bucket of a leaf and a path that exist is far shorter.
_LONGEST: Final = 200


def export_to(
    view: StoreView,
    names: Sequence[str] | None,
    states: frozenset[str],
    to: str,
    *,
    force: bool,
    found: bool,
) -> None:
    """Write findings.

    Args:
        view: The campaign.
        names: Names of findings; None for all.
        states: Only those in these states.
        to: A directory, which may be new; a file whose name ends in `.jsonl`; or `-`.
        force: Replace files.
        found: As they were found, not shrunk.

    Raises:
        InputError: A file is in the way, or cannot be written.
        StoreError: There is no such finding, or one is damaged.
    """
    chosen = list(dict.fromkeys(names)) if names else names_of(view)
    chosen = [name for name in chosen if load(view, name).record.state in states]
    if to == STDOUT:
        for name in chosen:
            sys.stdout.write(_line(load(view, name), found=found).decode())
        return
    target = Path(to)
    try:
        if target.suffix == LINES and not target.is_dir():
            _write_lines(view, chosen, target, force=force, found=found)
        else:
            _write_files(view, chosen, target, force=force, found=found)
    except OSError as error:
        raise InputError("--to", f"{error.filename or target}: {reason_of(error)}") from error


def _write_lines(view: StoreView, names: Sequence[str], file: Path, *, force: bool, found: bool) -> None:
    _refuse_existing([file], force=force)
    write_atomically(file, b"".join(_line(load(view, name), found=found) for name in names))


def _write_files(view: StoreView, names: Sequence[str], directory: Path, *, force: bool, found: bool) -> None:
    files = {name: _file_of(directory, name) for name in names}
    if os.path.lexists(directory) and not directory.is_dir():
        raise InputError("--to", f"{directory}: neither a directory nor a file of JSON lines (*{LINES})")
    _refuse_existing(list(files.values()), force=force)
    directory.mkdir(parents=True, exist_ok=True)
    for name, file in files.items():
        write_atomically(file, encode(_document(load(view, name), found=found)))


def _file_of(directory: Path, name: str) -> Path:
    """Where a finding goes. `load` has compared the name with that of its bucket, which has no separators."""
    file = directory / f"{name}.json"
    if len(name) > _LONGEST or file.parent != directory or file.name != f"{name}.json":
        raise InputError("--to", f"{name[:_LONGEST]!r} is no name of a file")
    return file


def _refuse_existing(files: Sequence[Path], *, force: bool) -> None:
    """Raise InputError if a file is in the way; a directory always is."""
    for file in files:
        if file.is_dir() or (not force and os.path.lexists(file)):
            raise InputError("--to", f"{file}: exists" + ("" if file.is_dir() else " (--force replaces it)"))


def _document(loaded: Loaded, *, found: bool) -> dict[str, Any]:
    return loaded.as_found()[0] if found else loaded.document


def _line(loaded: Loaded, *, found: bool) -> bytes:
    return msgspec.json.encode(_document(loaded, found=found)) + b"\n"
