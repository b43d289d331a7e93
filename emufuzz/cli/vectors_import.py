"""`emufuzz vectors import`: tests of other projects as vectors of this one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Final

import msgspec
import typer
import zstandard

from emufuzz.case.json import case_to_obj
from emufuzz.case.moo_vectors import moo_vectors, read_revoked
from emufuzz.cli.errors import EXIT_OK, InputError
from emufuzz.report.columns import table

_ZSTD: Final = ".zst"
_PARTIAL: Final = ".partial"
_to_json: Final = msgspec.json.Encoder().encode


@dataclass(slots=True)
class _Imported:
    """What became of the tests of one file."""

    imported: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def import_files(
    files: Annotated[list[Path], typer.Argument(help="MOO files, plain or gzip.")],
    out: Annotated[Path, typer.Option(help="Vector lines to write; compressed if it ends in .zst.")],
    revoked: Annotated[Path | None, typer.Option(help="A suite's list of hashes to leave out.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Turn MOO files of the SingleStepTests into recorded vectors (docs/moo.md).

    Tests that say nothing of later processors are left out and counted by reason. The file is complete or
    not there. Judge it with `vectors check FILE --oracle`.
    """
    if any(out.resolve() == path.resolve() for path in files):
        raise InputError(str(out), "is one of the files to read")
    hashes = read_revoked(revoked) if revoked is not None else frozenset[str]()
    counts = [_Imported() for _ in files]
    with _written(out) as stream:
        for path, count in zip(files, counts, strict=True):
            for line in _lines(path, count, hashes):
                stream.write(line)
    print(_as_json(files, counts) if as_json else "\n".join(_report(files, counts)))
    return EXIT_OK


def _lines(path: Path, count: _Imported, revoked: frozenset[str]) -> Iterator[bytes]:
    for case, expect in moo_vectors(path, count.skipped, revoked):
        count.imported += 1
        yield _to_json({"case": case_to_obj(case), "expect": expect}) + b"\n"


@contextmanager
def _written(out: Path) -> Iterator[IO[bytes]]:
    """A file that gets its name when everything is in it."""
    partial = out.with_name(out.name + _PARTIAL)
    try:
        with partial.open("wb") as raw:
            if out.suffix == _ZSTD:
                with zstandard.ZstdCompressor(level=12).stream_writer(raw, closefd=False) as packed:
                    yield packed
            else:
                yield raw
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)


def _report(files: Sequence[Path], counts: Sequence[_Imported]) -> list[str]:
    """A table of the files, and the reasons why tests were skipped."""
    numbers = [(count.imported, count.skipped.total()) for count in counts]
    rows = [(path.name, str(sum(both)), *map(str, both)) for path, both in zip(files, numbers, strict=True)]
    imported, skipped = (sum(column) for column in zip(*numbers, strict=True))
    rows.append(("all", str(imported + skipped), str(imported), str(skipped)))
    return [
        *table(["file", "tests", "imported", "skipped"], rows, 1000),
        *(f"{number} skipped: {reason}" for reason, number in _reasons(counts).most_common()),
    ]


def _as_json(files: Sequence[Path], counts: Sequence[_Imported]) -> str:
    return json.dumps(
        {
            "imported": sum(count.imported for count in counts),
            "skipped": dict(_reasons(counts).most_common()),
            "files": {
                str(path): {"imported": count.imported, "skipped": count.skipped.total()}
                for path, count in zip(files, counts, strict=True)
            },
        }
    )


def _reasons(counts: Sequence[_Imported]) -> Counter[str]:
    return sum((count.skipped for count in counts), Counter())
