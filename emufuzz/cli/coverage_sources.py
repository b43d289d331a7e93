"""What `emufuzz coverage` is asked about: a campaign, a report, or cases in files and directories."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from emufuzz.case.json import case_from_obj
from emufuzz.case.model import Case
from emufuzz.cli.documents import CAMPAIGN_FILE, Document, files_of, read_documents
from emufuzz.cli.errors import InputError, at
from emufuzz.cli.progress import counted
from emufuzz.fuzz.examples import ExampleError, example_case, example_cases
from emufuzz.fuzz.store import StoreError, StoreView
from emufuzz.report.coverage.document import MARK, MAX_DOCUMENT, DocumentError, from_json
from emufuzz.report.coverage.model import NOWHERE, Coverage, coverage_of
from emufuzz.report.replay import Replayer

#: A report is told from cases by its first bytes.
_HEAD: Final = 200


def is_campaign(path: Path) -> bool:
    """Whether a path is a campaign directory."""
    return (path / CAMPAIGN_FILE).is_file()


def is_report(path: Path) -> bool:
    """Whether a path is a file that `--json` wrote."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(_HEAD)
    return head.lstrip().startswith(b"{") and f'"{MARK}"'.encode() in head


def coverage_from(paths: Sequence[Path]) -> Coverage:
    """What one campaign or report, or all the cases together, cover.

    Raises:
        InputError: Something of it cannot be read or run.
        OSError: A file cannot be read.
    """
    for path in paths:
        if (is_campaign(path) or is_report(path)) and len(paths) > 1:
            raise InputError(str(path), "a campaign or report stands alone; --diff compares two")
    if is_campaign(paths[0]):
        return _of_campaign(paths[0])
    if is_report(paths[0]):
        return _of_report(paths[0])
    return _of_cases(paths)


def _of_campaign(path: Path) -> Coverage:
    try:
        with closing(StoreView(path)) as view:
            return coverage_of(view)
    except StoreError as error:
        raise InputError("", str(error)) from error


def _of_report(path: Path) -> Coverage:
    try:
        with path.open("rb") as file:
            return from_json(file.read(MAX_DOCUMENT + 1))
    except DocumentError as error:
        raise InputError(str(path), str(error)) from error


def _of_cases(paths: Sequence[Path]) -> Coverage:
    coverage, replayer = Coverage("cases"), Replayer()
    for where, case in counted(_cases(paths)):
        with at(where):
            outcome = replayer.run_subject(case)
        coverage.add_case(case, outcome, where)
    coverage.title = f"cases of {', '.join(map(str, paths))}"
    coverage.entries = dict(sorted(coverage.entries.items()))
    return coverage


def cases_from(paths: Sequence[Path]) -> Iterator[tuple[str, Case]]:
    """The cases to run for line coverage: of a campaign the first one of every cell.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    if is_report(paths[0]):
        raise InputError(str(paths[0]), "a report has no cases to run; --lines needs a campaign or cases")
    if not is_campaign(paths[0]):
        yield from _cases(paths)
        return
    try:
        with closing(StoreView(paths[0])) as view:
            entries = coverage_of(view).entries.values()
            places = [_place(entry.where) for entry in entries if entry.where != NOWHERE]
            yield from example_cases(view, places)
    except (StoreError, ExampleError) as error:
        raise InputError("", str(error)) from error


def case_at(path: Path, where: str) -> Case:
    """The case at a place of a campaign, `BATCH:PLACE`.

    Raises:
        InputError: There is no such case or campaign.
    """
    try:
        with closing(StoreView(path)) as view:
            return example_case(view, *_place(where))
    except (StoreError, ExampleError) as error:
        raise InputError("", str(error)) from error
    except ValueError as error:
        raise InputError("--case", f"{where!r} is not BATCH:PLACE") from error


def _place(where: str) -> tuple[int, int]:
    batch, _, index = where.partition(":")
    place = int(batch), int(index)
    if max(place) >= 1 << 63:
        raise ValueError(f"{where}: too large")  # for SQLite
    return place


def _cases(paths: Sequence[Path]) -> Iterator[tuple[str, Case]]:
    for path in paths:
        for file in files_of(path):
            for document in read_documents(file):
                yield document.where, _case(document)


def _case(document: Document) -> Case:
    """The case of a document: itself, or that of a vector or finding."""
    value: Any = document.value
    with at(document.where):
        return case_from_obj(value.get("case", value))
