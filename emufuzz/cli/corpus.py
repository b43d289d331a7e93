"""`emufuzz corpus`: directories of cases: list, show, add, merge, distill, import, export, coverage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

Corpus = Annotated[Path, typer.Argument(metavar="CORPUS", help="Corpus directory.")]
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Case, vector or finding files, directories of them, libFuzzer directories, MOO files, "
        "campaigns; flat:SEED:N, paths:SEED:N, handlers:SEED:N and crafted: make cases.",
    ),
]
Form = Annotated[
    str,
    typer.Option("--format", help="cases, libfuzzer, moo or campaign; by default what a source looks like."),
]
AsJson = Annotated[bool, typer.Option("--json", help="JSON instead of text.")]
Aspects = Annotated[
    str, typer.Option(help="What cells are told apart by: leaf,mode,cpl,outcome,path or some of them.")
]
ALL_ASPECTS = "leaf,mode,cpl,outcome,path"


@app.callback()
def corpus() -> None:
    """Work with corpora: directories of cases as JSON lines, one file per family or exit path."""


@app.command("list")
def list_files(directory: Corpus, as_json: AsJson = False) -> int:
    """List the files of a corpus: cases, bytes, leaves, modes and outcomes of each."""
    from emufuzz.cli.corpus_show import listed, table_of

    with _errors():
        rows = listed(directory)
    print(_json(rows) if as_json else "\n".join(table_of(rows)))
    return EXIT_OK


@app.command("show")
def show(
    directory: Corpus,
    names: Annotated[list[str], typer.Argument(metavar="ID...", help="Cases, by id or FILE/ID.")],
    as_json: AsJson = False,
) -> int:
    """Show cases: instruction, state, and what the emulator makes of it. `repro` asks oracles, too."""
    from emufuzz.cli.corpus_show import found, shown

    with _errors():
        entries = found(directory, names)
    for name, entry in entries:
        print(entry.line().decode() if as_json else "\n".join(shown(name, entry)))
    return EXIT_OK


@app.command("add")
def add(directory: Corpus, sources: Sources, form: Form = "", as_json: AsJson = False) -> int:
    """Add all cases of the sources that the corpus does not have, each to the file of its family.

    Cases that are there stay as they are. Cases without an id, or with one that is taken, get another.
    """
    from emufuzz.cli.corpus_write import add_all, report

    with _errors():
        counts = add_all(directory, sources, form)
    print(report(counts, as_json=as_json))
    return EXIT_OK


app.command("import", help="As `add`; the name for sources of other programs.")(add)


@app.command("merge")
def merge(
    directory: Corpus,
    sources: Sources,
    form: Form = "",
    cells: Aspects = ALL_ASPECTS,
    cut: Annotated[bool, typer.Option("--cut", help="Cut cases down to what is new about them.")] = False,
    as_json: AsJson = False,
) -> int:
    """Add those cases of the sources that cover something that the corpus does not.

    What counts are cells, as --cells has them, and arcs of emulator/ and kvm/ (docs/corpus.md).
    """
    from emufuzz.cli.corpus_write import merge_new, report

    aspects = _aspects(cells)
    with _errors():
        counts = merge_new(directory, sources, form, aspects, reduce=cut)
    print(report(counts, as_json=as_json))
    return EXIT_OK


@app.command("distill")
def distill(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Directory for the distilled corpus; new or empty.")],
    form: Form = "",
    cells: Aspects = ALL_ASPECTS,
    keep: Annotated[bool, typer.Option("--keep", help="Do not cut cases down to what they are for.")] = False,
    as_json: AsJson = False,
) -> int:
    """Write a small corpus that covers what all cases of the sources cover together.

    The same sources give the same corpus. Progress goes to standard error.
    """
    from emufuzz.cli.corpus_write import distill_to, report

    aspects = _aspects(cells)
    with _errors():
        counts = distill_to(out, sources, form, aspects, reduce=not keep)
    print(report(counts, as_json=as_json))
    return EXIT_OK


@app.command("export")
def export(
    directory: Corpus,
    to: Annotated[Path, typer.Option(help="Directory (libfuzzer, moo), or file of JSON lines (cases).")],
    form: Annotated[str, typer.Option("--format", help="cases, libfuzzer or moo.")],
    force: Annotated[bool, typer.Option("--force", help="Replace files.")] = False,
    as_json: AsJson = False,
) -> int:
    """Export the cases of a corpus: as one file of JSON lines, to libFuzzer, or as MOO files of real mode.

    What a format cannot hold is left out and counted by reason.
    """
    from emufuzz.cli.corpus_export import export_to
    from emufuzz.cli.corpus_write import report

    with _errors():
        counts = export_to(directory, to, form, force=force)
    print(report(counts, as_json=as_json))
    return EXIT_OK


@app.command("coverage")
def coverage(
    directory: Corpus,
    missing: Annotated[bool, typer.Option("--missing", help="List what is not reached.")] = False,
    fail_under: Annotated[
        str, typer.Option(help="Exit code 1 below these percentages: leaves,emulator,kvm (99,97,90).")
    ] = "",
    as_json: AsJson = False,
) -> int:
    """How much a corpus reaches: legal leaves per mode, branches of emulator/ and kvm/."""
    from emufuzz.cli.corpus_coverage import json_of, limits_of, lines_of, measured

    limits = limits_of(fail_under)
    with _errors():
        reach = measured(directory)
    print(json_of(reach) if as_json else "\n".join(lines_of(reach, missing=missing)))
    return EXIT_DISAGREE if _below(reach.percentages(), limits) else EXIT_OK


def _below(percentages: tuple[float, ...], limits: tuple[float, ...]) -> bool:
    return any(value < limit for value, limit in zip(percentages, limits, strict=True))


def _json(value: object) -> str:
    import json

    return json.dumps(value)


def _aspects(text: str) -> tuple[str, ...]:
    from emufuzz.cli.names import chosen_names
    from emufuzz.fuzz.corpus.observe import ASPECTS

    return chosen_names("--cells", "aspect", text, ASPECTS)


@contextmanager
def _errors() -> Iterator[None]:
    """Errors of corpora, which may come from anybody, as the user's."""
    from emufuzz.fuzz.corpus.directory import CorpusError
    from emufuzz.fuzz.corpus.measure import MeasureError
    from emufuzz.report.plain import printable

    try:
        yield
    except (CorpusError, MeasureError) as error:
        raise InputError("", printable(str(error))) from error
