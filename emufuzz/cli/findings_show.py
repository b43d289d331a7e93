"""`emufuzz findings show`: what is known of one finding, how it was shrunk, and the case explained."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from typing import Any, Final

import msgspec

from emufuzz.cli.documents import Document
from emufuzz.cli.errors import InputError
from emufuzz.cli.findings_list import digested
from emufuzz.cli.repro import replay_document, result_lines
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.finding import FAILED
from emufuzz.fuzz.finding_json import digest
from emufuzz.fuzz.shrink import non_default_fields
from emufuzz.fuzz.store import StoreError, StoreView
from emufuzz.fuzz.triage.loaded import Loaded
from emufuzz.fuzz.triage.run import filter_of
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.report.columns import table
from emufuzz.report.plain import printable
from emufuzz.report.replay import Replayer, reason_text

_LABEL: Final = 10
#: Differences of a failure that are shown, and lines of each.
_DIFFERENCES: Final = 4
_LINES: Final = 20
_PROGRAM: Final = "cmd:"


def json_object(view: StoreView, loaded: Loaded, *, found: bool) -> str:
    """Everything that the campaign has of a finding, as one JSON object on one line."""
    document = loaded.as_found()[0] if found else loaded.document
    obj = digested(loaded) | {
        "digest": digest(document),
        "run": _run(view, loaded.record.run),
        "shrinking": _shrinking(loaded),
        "finding": document,
    }
    return json.dumps(obj)


def text_lines(
    view: StoreView, loaded: Loaded, others: tuple[str, ...], *, found: bool
) -> Iterator[list[str]]:
    """A finding for people, in parts: first what needs no run of the case.

    Args:
        view: The campaign.
        loaded: The finding.
        others: Names of oracles beside Unicorn; without any, those of the finding.
        found: Show the case as it was found, not the shrunk one.
    """
    if found:
        document, finding = loaded.as_found()
        loaded = loaded._replace(document=document, finding=finding)
    yield _plain([*_head(view, loaded), "", *_shrink_lines(loaded), ""])
    yield _plain(_explained(view, loaded, others))
    yield ["", f"  {_command(view, loaded, found=found)}"]


def _plain(lines: list[str]) -> list[str]:
    return [printable(line) for line in lines]


def _head(view: StoreView, loaded: Loaded) -> list[str]:
    record, finding = loaded.record, loaded.finding
    run = _run(view, record.run)
    versions = loaded.document.get("versions")
    ran = versions if isinstance(versions, dict) else {}
    rows = {
        "state": record.state,
        "reason": _reason(record.reason),
        "note": record.note,
        "leaf": record.bucket.leaf or "(not decoded)",
        "place": record.bucket.place,
        "kind": record.bucket.kind,
        "verdict": f"{record.bucket.verdict}: {finding.sentence}",
        "cases": f"{record.cases:,}",
        "number": f"batch {record.batch}, case {record.position}",
        "run": f"{record.run}, {run['started']}, workers {run['workers']}" if run else str(record.run),
        "versions": ", ".join(f"{name} {value}" for name, value in ran.items()),
        "fields": ", ".join(non_default_fields(finding.case)) or "none but the defaults of its mode",
        "digest": digest(loaded.document),
    }
    return [f"finding {loaded.name}", *(f"  {k:<{_LABEL}}{v}" for k, v in rows.items() if v)]


def _reason(reason: str) -> str:
    """A reason with the words that its gaps and quirks stand for."""
    name = filter_of(reason)
    what = reason.removeprefix(f"{name}: ") if name else ""
    return f"{name}: {reason_text(what)}" if what else reason


def _run(view: StoreView, number: int) -> dict[str, Any]:
    """The run that found it; empty if the campaign has none of this number."""
    rows = view.rows("SELECT started, workers, versions FROM runs WHERE id = ?", (number,))
    if not rows:
        return {}
    started, workers, versions = rows[0]
    with view.errors():
        ran = msgspec.json.decode(versions, type=dict[str, str])
    return {"number": number, "started": started, "workers": workers, "versions": ran}


def _shrinking(loaded: Loaded) -> dict[str, Any] | None:
    """What shrinking did; None if nobody has tried.

    Raises:
        StoreError: It is damaged.
    """
    text = loaded.record.passes
    if text is None:
        return None
    try:
        value = msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise StoreError(
            f"finding {loaded.name} is damaged: its passes are no JSON object: {error}"
        ) from error
    passes = value.get("passes")
    if not isinstance(passes, list) or not all(isinstance(one, list | dict) for one in passes):
        raise StoreError(f"finding {loaded.name} is damaged: its passes are no array")
    return value


def _shrink_lines(loaded: Loaded) -> list[str]:
    """The log of shrinking, and why the case is not smaller."""
    log = _shrinking(loaded)
    if log is None:
        return ["not shrunk yet"]
    headers = ("pass", "tried", "kept", "fields before", "after")
    rows = [tuple(str(cell) for cell in _values(one)) for one in log["passes"]]
    if any(len(row) != len(headers) for row in rows):
        raise StoreError(f"finding {loaded.name} is damaged: a pass has other members")
    end = "shrunk" if log.get("complete") else "not shrunk to the end"
    reason = log.get("reason")
    said = f"{end}: {reason}" if reason else end
    return [
        said,
        *(f"  {line}" for line in table(headers, [tuple(map(printable, row)) for row in rows], 1000)),
    ]


def _values(one: list[Any] | dict[str, Any]) -> list[Any]:
    return list(one.values()) if isinstance(one, dict) else one


def _explained(view: StoreView, loaded: Loaded, others: tuple[str, ...]) -> list[str]:
    """The case as `repro` explains it; of a failure what was recorded, as it may fail again."""
    if loaded.finding.verdict == FAILED:
        return _failure_lines(loaded)
    where = str(view.path_of(loaded.record.bucket))
    bug = view.config().bug
    replayer = Replayer()
    try:
        with seeded_bug(bug):
            result = replay_document(Document(where, loaded.document), replayer, others)
    except (InputError, OracleUnavailableError) as error:
        return [f"not run again: {error}"]
    return [*([f"with the seeded bug {bug}:"] if bug else []), *result_lines(result, replayer)]


def _failure_lines(loaded: Loaded) -> list[str]:
    lines = ["not run again, as it may end this process, too; recorded was:"]
    for difference in loaded.finding.differences[:_DIFFERENCES]:
        text = difference.subject or difference.oracle
        shown = text.strip().splitlines()[-_LINES:]
        lines += [f"  {difference.kind} of {difference.field}:", *(f"    {line}" for line in shown)]
    return lines


def _command(view: StoreView, loaded: Loaded, *, found: bool) -> str:
    """The command line that runs the case again."""
    file = shlex.quote(str(view.path_of(loaded.record.bucket)))
    if found and loaded.record.shrunk is not None:
        directory = shlex.quote(str(view.directory))
        return f"emufuzz findings export {directory} {loaded.name} --found --to - | emufuzz repro -"
    versions = loaded.document.get("versions")
    ran = versions if isinstance(versions, dict) else {}
    oracles, options = str(ran.get("oracles", "")), ""
    if _PROGRAM in oracles:
        options = f" --oracles {shlex.quote(printable(oracles))}"
    if str(ran.get("subject", "")).startswith(_PROGRAM):
        program = _PROGRAM + str(ran.get("command", ""))
        options += f" --subject {shlex.quote(printable(program))}"
    return f"emufuzz repro {file}{options}"
