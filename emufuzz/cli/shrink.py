"""`emufuzz shrink`: the simplest cases that are still the same findings, and how they came about."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer

from emufuzz.case.json import case_from_obj
from emufuzz.case.model import Case
from emufuzz.cli.documents import STDIN, Document, read_documents
from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError, at, reported
from emufuzz.cli.names import oracles_beside
from emufuzz.cli.recorded import recorded_bug, recorded_oracles, recorded_program
from emufuzz.fuzz.bugs import seeded_bug
from emufuzz.fuzz.engines import campaign_versions, make_kvm_subject, make_oracle, make_subject
from emufuzz.fuzz.files import write_atomically
from emufuzz.fuzz.finding import Finding
from emufuzz.fuzz.finding_json import encode, finding_from_obj, finding_to_obj
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.shrink import Limits, Shrunk, non_default_fields, shrink, shrinking_to_obj
from emufuzz.oracle.registry import open_oracle
from emufuzz.report.columns import table
from emufuzz.report.plain import printable

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

#: What names of shrunk findings end in.
SUFFIX: Final = ".min.json"
_STDOUT: Final = "-"
_HEADERS: Final = ("pass", "tried", "kept", "fields before", "after")
_WIDTH: Final = 1000


class Task(NamedTuple):
    """A document, where its result goes, and whom to ask.

    Attributes:
        document: What was read.
        output: The file for the shrunk finding; None = standard output.
        others: Names of oracles beside the first one; without any, those of the finding.
    """

    document: Document
    output: Path | None
    others: tuple[str, ...]


@app.command("shrink")
def shrink_files(
    files: Annotated[list[Path], typer.Argument(help="Findings or cases; - for stdin.")],
    output: Annotated[
        str, typer.Option(help="Where the shrunk finding goes; - for stdout. FILE.min.json by default.")
    ] = "",
    oracles: Annotated[
        str, typer.Option(help="Comma-separated oracles beside unicorn; those of the finding by default.")
    ] = "",
    calls: Annotated[int, typer.Option(min=1, help="Cases to run at most, per finding.")] = Limits().calls,
    seconds: Annotated[
        float, typer.Option(min=0.001, help="Seconds after which to give up, per finding.")
    ] = Limits().seconds,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object per finding.")] = False,
) -> int:
    """Shrink findings: fewer instructions, prefixes, pages and devices, default state, simple values.

    FILE stays as it is; the result of a.json goes to a.min.json beside it, that of line 3 of a.jsonl to
    a.3.min.json, and that of a file called a.min.json into the same file.

    Exit code, the highest of all findings: 0 = shrunk, or nothing to shrink, 1 = not a finding any more,
    or another one, 2 = bad input, 4 = an oracle is missing.
    """
    others, limits = oracles_beside(oracles), Limits(calls, seconds)
    engines = Engines()
    codes = [EXIT_OK]
    for path in files:
        with reported(codes.append):
            for document in _documents(path, alone=bool(output), files=len(files)):
                task = Task(document, _output(path, document, output), others)
                codes.append(_one(task, engines, limits, as_json=as_json))
    return max(codes)


def _documents(path: Path, *, alone: bool, files: int) -> Iterator[Document]:
    """The documents of a file; InputError before the first one if there has to be one alone and is not."""
    documents = read_documents(path)
    first = list(islice(documents, 2 if alone else 0))
    if alone and len(first) * files > 1:
        raise InputError("--output", "takes the result of one finding, and there are several")
    return chain(first, documents)


def _output(path: Path, document: Document, chosen: str) -> Path | None:
    """The file for a document's result; None = standard output."""
    if chosen:
        return None if chosen == _STDOUT else Path(chosen)
    if str(path) == STDIN:
        return None
    if path.name.endswith(SUFFIX):
        return path
    line = document.where.removeprefix(str(path)).replace(":", ".")
    return path.with_name(path.name.removesuffix(path.suffix) + line + SUFFIX)


class Engines:
    """Subjects and oracles, opened when they are first needed."""

    def __init__(self) -> None:
        self._loops: dict[tuple[str, tuple[str, ...]], CampaignLoop] = {}
        self._versions: dict[tuple[str, tuple[str, ...]], dict[str, str]] = {}

    def loop(self, case: Case, others: tuple[str, ...]) -> CampaignLoop:
        """What finds findings: the KVM model for a case with a path, else the emulator alone.

        Raises:
            OracleUnavailableError: An oracle cannot work here.
        """
        key = _subject_of(case), others
        if key not in self._loops:
            subject = make_subject() if case.path is None else make_kvm_subject()
            self._loops[key] = CampaignLoop(
                subject, make_oracle(), others=[open_oracle(name) for name in others]
            )
        return self._loops[key]

    def versions(self, case: Case, others: tuple[str, ...]) -> dict[str, str]:
        """What ran, for the record."""
        key = _subject_of(case), others
        if key not in self._versions:
            self._versions[key] = campaign_versions(*key)
        return self._versions[key]


def _subject_of(case: Case) -> str:
    return "emulator" if case.path is None else "kvm"


def _refuse_program(document: Document) -> None:
    """Raise InputError if the finding is about a program, which its file does not start."""
    name = recorded_program(document)
    if name:
        raise InputError(document.where, f"its subject {name!r} is a program: only its campaign shrinks it")


def _one(task: Task, engines: Engines, limits: Limits, *, as_json: bool) -> int:
    """Shrink one document, write the result and say what became of it; errors name the document."""
    document = task.document
    with at(document.where):
        _refuse_program(document)
        others = task.others or recorded_oracles(document)
        finding, case = _read(document)
        loop = engines.loop(case, others)
        loop.subject.check(case)
        bug = recorded_bug(document.value)
        with seeded_bug(bug):
            finding = finding or loop.finding_of(case)
            shrunk = None if finding is None else shrink(finding, loop.finding_of, limits)
        if finding is None or shrunk is None or not shrunk.found:
            return _gone(document, "no finding" if shrunk is None else shrunk.reason, as_json=as_json)
        obj = finding_to_obj(
            shrunk.finding, engines.versions(case, others) | ({"seed_bug": bug} if bug else {})
        )
    _deliver(task, finding, shrunk, obj, as_json=as_json)
    return EXIT_OK


def _read(document: Document) -> tuple[Finding | None, Case]:
    """The recorded finding, None for a bare case, and the case."""
    value = document.value
    if "expect" in value:
        raise InputError(document.where, "a recorded vector, expected a finding or a case")
    if "case" not in value:
        return None, case_from_obj(value)
    finding = finding_from_obj(value)
    return finding, finding.case


def _gone(document: Document, what: str, *, as_json: bool) -> int:
    """Say that there is nothing to shrink."""
    if as_json:
        print(json.dumps({"where": document.where, "found": False, "reason": what}))
    else:
        print(f"{document.where}: not shrunk: {what}")
    return EXIT_DISAGREE


def _deliver(task: Task, before: Finding, shrunk: Shrunk, obj: dict[str, Any], *, as_json: bool) -> None:
    """Write the shrunk finding, and report: on stderr if the finding itself goes to stdout."""
    log = shrinking_to_obj(shrunk)
    document = encode(obj | {"shrinking": log})
    if task.output is not None:
        write_atomically(task.output, document)
    if as_json:
        where = {"where": task.document.where, "found": True, "bucket": obj["bucket"]}
        fields = {"fields": non_default_fields(shrunk.finding.case), "calls": shrunk.calls}
        written = {"output": None if task.output is None else str(task.output)}
        print(json.dumps(where | log | fields | written | {"finding": obj}))
        return
    report = sys.stderr if task.output is None else sys.stdout
    print("\n".join(_report(task, before, shrunk, obj["bucket"])), file=report)
    if task.output is None:
        sys.stdout.write(document.decode())


def _report(task: Task, before: Finding, shrunk: Shrunk, bucket: str) -> list[str]:
    fields = non_default_fields(shrunk.finding.case)
    rows = [tuple(str(cell) for cell in log) for log in shrunk.passes]
    lines = [f"{task.document.where}: {bucket}"]
    lines += [f"  {line}" for line in table(_HEADERS, rows, _WIDTH)] if rows else []
    had = len(non_default_fields(before.case))
    lines += [
        f"  {'shrunk' if shrunk.complete else 'not shrunk to the end'}: {shrunk.calls} cases were run",
        f"  code: {shrunk.finding.case.code.hex()}",
        f"  fields: {len(fields)} of {had}{': ' if fields else ''}{', '.join(fields)}",
    ]
    if shrunk.reason:
        lines.append(f"  reason: {shrunk.reason}")
    if task.output is not None:
        lines.append(f"  written: {task.output}")
    return [printable(line) for line in lines]
