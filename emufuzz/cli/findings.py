"""`emufuzz findings`: what a campaign has found, also while it runs: list, show, mark, export, triage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError

if TYPE_CHECKING:
    from emufuzz.fuzz.store import StoreView
    from emufuzz.fuzz.store.marker import StoreMarker

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

Directory = Annotated[Path, typer.Argument(metavar="DIR", help="Campaign directory.")]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
AsFound = Annotated[bool, typer.Option("--found", help="As it was found, before it was shrunk.")]

#: What `mark --state` takes beside marks: takes a mark away.
NO_MARK = "none"


@app.callback()
def findings() -> None:
    """Work with the findings of a campaign, also while it runs."""


@app.command("list")
def list_findings(
    directory: Directory,
    state: Annotated[str, typer.Option(help="Only those in these states (comma-separated).")] = "",
    leaf: Annotated[str, typer.Option(help="Only those of this leaf.")] = "",
    mode: Annotated[str, typer.Option(help="Only those in these modes (comma-separated).")] = "",
    place: Annotated[str, typer.Option(help="Only those of this place: PATH-MODE, or MODE.")] = "",
    kind: Annotated[str, typer.Option(help="Only those of these kinds (comma-separated).")] = "",
    verdict: Annotated[str, typer.Option(help="alone, split, failed (comma-separated).")] = "",
    sort: Annotated[str, typer.Option(help="By number (as found), cases, name, state or leaf.")] = "number",
    as_json: AsJson = False,
) -> int:
    """List findings: name, state, cases, instruction, fields that matter, who disagrees.

    With --json one object per line; `digest` is the SHA-256 of the finding without versions.
    """
    from emufuzz.cli.findings_list import Chosen, json_line, listed, table_lines

    chosen = Chosen.of(state, leaf, mode, place, kind, verdict)
    with _reading(directory) as view:
        rows = listed(view, chosen, sort)
        if as_json:
            for row in rows:
                print(json_line(row))
        else:
            print("\n".join(table_lines(rows)))
    return EXIT_OK


@app.command("show")
def show(
    directory: Directory,
    name: Annotated[str, typer.Argument(help="Name of the finding, as `list` has it.")],
    as_json: AsJson = False,
    found: AsFound = False,
    oracles: Annotated[
        str, typer.Option(help="Comma-separated oracles beside unicorn; those of the finding by default.")
    ] = "",
) -> int:
    """Show a finding: what is known of it, how it was shrunk, and the case explained as by `repro`.

    With --json one object, and the case is not run.
    """
    from emufuzz.cli.findings_show import json_object, text_lines
    from emufuzz.cli.names import oracles_beside
    from emufuzz.fuzz.triage.loaded import load

    others = oracles_beside(oracles)
    with _reading(directory) as view:
        loaded = load(view, name)
        if as_json:
            print(json_object(view, loaded, found=found))
            return EXIT_OK
        for lines in text_lines(view, loaded, others, found=found):
            print("\n".join(lines), flush=True)
    return EXIT_OK


@app.command("mark")
def mark(
    directory: Directory,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of findings.")],
    state: Annotated[str, typer.Option(help="known, bug, new; none takes a mark away.")],
    note: Annotated[str | None, typer.Option(help="What to say of them.")] = None,
) -> int:
    """Mark findings, all that are named or none. Works while the campaign runs; filters keep marks."""
    from emufuzz.fuzz.store.marker import MARKS, MAX_NOTE

    if state not in {*MARKS, NO_MARK}:
        raise InputError("--state", f"unknown mark {state!r}, known are {', '.join((*MARKS, NO_MARK))}")
    if note is not None and len(note) > MAX_NOTE:
        raise InputError("--note", f"{len(note)} characters, at most {MAX_NOTE} are taken")
    with _marking(directory) as store:
        if state == NO_MARK:
            store.unmark(names, note)
        else:
            store.mark(names, state, note)
    return EXIT_OK


@app.command("export")
def export(
    directory: Directory,
    to: Annotated[str, typer.Option(help="A directory, or a file of JSON lines (NAME.jsonl; - = stdout).")],
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Names of findings; all by default.")
    ] = None,
    state: Annotated[str, typer.Option(help="Only those in these states (comma-separated).")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace files.")] = False,
    found: AsFound = False,
) -> int:
    """Export findings as JSON: one file each, under the bucket's name, or one line each.

    Each file appears whole or not at all; nothing is written if a file is in the way.
    """
    from emufuzz.cli.findings_export import export_to
    from emufuzz.cli.findings_list import Chosen
    from emufuzz.fuzz.store.records import STATES

    states = Chosen.of(state, "", "", "", "", "").states or frozenset(STATES)
    with _reading(directory) as view:
        export_to(view, names, states, to, force=force, found=found)
    return EXIT_OK


@app.command("triage")
def triage_again(
    directory: Directory,
    filters: Annotated[str, typer.Option(help="Comma-separated filters; all by default.")] = "",
    known: Annotated[
        list[Path] | None, typer.Option(help="Campaign whose marks count here, too; may be repeated.")
    ] = None,
    oracles: Annotated[
        str, typer.Option(help="Has to name the campaign's oracles if one of them is a program.")
    ] = "",
    as_json: AsJson = False,
) -> int:
    """Judge all findings again with the present code, but for those that people have marked.

    Exit code 1 if new findings remain.
    """
    from emufuzz.cli.triaging import filters_of, json_of, judge_again, marks_in
    from emufuzz.report.plain import printable

    chosen = filters_of(filters)
    marks = marks_in(known or [])
    with _marking(directory) as store:
        summary = judge_again(store, chosen, marks, oracles)
    shown = [json_of(summary)] if as_json else map(printable, summary.lines(shown=1000))
    print("\n".join(shown))
    return EXIT_DISAGREE if summary.new else EXIT_OK


@contextmanager
def _reading(directory: Path) -> Iterator[StoreView]:
    """A campaign, for reading; what is wrong with it is bad input."""
    from emufuzz.fuzz.store import StoreView

    with _damage():
        view = StoreView(directory)
        try:
            yield view
        finally:
            view.close()


@contextmanager
def _marking(directory: Path) -> Iterator[StoreMarker]:
    """A campaign, for changing states."""
    from emufuzz.fuzz.store.marker import StoreMarker

    with _damage():
        store = StoreMarker(directory)
        try:
            yield store
        finally:
            store.close()


@contextmanager
def _damage() -> Iterator[None]:
    """Errors of a campaign directory, which may come from anybody, as the user's."""
    from emufuzz.fuzz.store import StoreError
    from emufuzz.report.plain import printable

    try:
        yield
    except StoreError as error:
        raise InputError("", printable(str(error))) from error
