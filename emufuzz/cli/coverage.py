"""`emufuzz coverage`: what was tested, and what was judged, of a campaign or of cases."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError

if TYPE_CHECKING:
    from emufuzz.report.coverage.lines import Share
    from emufuzz.report.coverage.model import Coverage

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

_LIMITS = ("LINE", "BRANCH", "LEAF")


@app.command("coverage")
def coverage(
    sources: Annotated[
        list[Path],
        typer.Argument(
            help="A campaign, a report of --json, or files and directories of cases.", show_default=False
        ),
    ],
    *,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print every cell as CSV.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything as JSON (docs/coverage.md).")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page that needs no network.")
    ] = None,
    lines: Annotated[
        list[str] | None,
        typer.Option(
            "--lines",
            metavar="FORMAT=PATH",
            help="Run the cases, write the lines they cover: html=DIR, lcov=FILE, cobertura=FILE, json=FILE.",
        ),
    ] = None,
    diff: Annotated[
        bool, typer.Option("--diff", help="Compare two sources: what is new, what is gone.")
    ] = False,
    fail_under: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-under",
            metavar="LINE|BRANCH|LEAF=PERCENT",
            help="Exit with 1 if less is covered. May be given several times.",
        ),
    ] = None,
    case: Annotated[
        str | None,
        typer.Option("--case", metavar="BATCH:PLACE", help="Print one case of a campaign as JSON."),
    ] = None,
) -> int:
    """Show what was tested: leaf, mode, CPL, outcome and exit path of cases, and how far oracles judged them.

    A campaign is read, cases are run through the emulator, those with a path through the model of KVM.
    Exit code: 0; 1 if --fail-under is not reached, or with --diff a leaf is no longer covered; 2 = bad input.
    """
    limits = _limits(fail_under or [])
    wanted = _formats(lines or [])
    if as_csv and as_json:
        raise InputError("--csv", "not together with --json")
    if diff:
        return _diff(sources, as_json=as_json, others=bool(as_csv or html or lines or limits or case))
    if case is not None:
        return _print_case(sources, case)
    from emufuzz.cli.coverage_sources import coverage_from

    found = coverage_from(sources)
    if html is not None:
        _write_page(html, found)
    _print(found, as_csv=as_csv, as_json=as_json)
    shares = _leaf_limit(found)
    if wanted or set(limits) & {"LINE", "BRANCH"}:
        shares |= _measure(sources, wanted, quiet=as_csv or as_json)
    return _judge(limits, shares)


def _write_page(path: Path, found: Coverage) -> None:
    from emufuzz.fuzz.files import reason_of, write_atomically
    from emufuzz.report.coverage.html import page

    try:
        write_atomically(path, page(found).encode())
    except OSError as error:
        raise InputError("--html", f"{path}: {reason_of(error)}") from error


def _limits(texts: list[str]) -> dict[str, float]:
    """What --fail-under asks for, in percent."""
    limits = {}
    for text in ",".join(texts).split(",") if texts else []:
        name, _, value = text.partition("=")
        if name.upper() not in _LIMITS:
            raise InputError(
                "--fail-under", f"{text!r} is none of {', '.join(f'{n}=PERCENT' for n in _LIMITS)}"
            )
        try:
            limits[name.upper()] = float(value)
        except ValueError:
            raise InputError("--fail-under", f"{text!r}: {value!r} is no number") from None
        if not 0 <= limits[name.upper()] <= 100:
            raise InputError("--fail-under", f"{text!r}: must be 0 to 100")
    return limits


def _formats(texts: list[str]) -> list[tuple[str, Path]]:
    from emufuzz.report.coverage.lines import FORMATS

    wanted = []
    for text in texts:
        form, _, path = text.partition("=")
        if form not in FORMATS or not path:
            raise InputError("--lines", f"{text!r} is none of {', '.join(f'{f}=PATH' for f in FORMATS)}")
        _check_target(form, Path(path))
        wanted.append((form, Path(path)))
    return wanted


def _check_target(form: str, path: Path) -> None:
    """Refuse what cannot be written, before cases are run for it."""
    from emufuzz.fuzz.files import reason_of, refuse_special

    try:
        if form != "html":
            refuse_special(path)
            path.parent.stat()
        elif path.exists() and not path.is_dir():
            raise InputError("--lines", f"{path}: not a directory")
    except OSError as error:
        raise InputError("--lines", f"{path}: {reason_of(error)}") from error


def _diff(sources: list[Path], *, as_json: bool, others: bool) -> int:
    from emufuzz.cli.coverage_sources import coverage_from
    from emufuzz.report.columns import output_width
    from emufuzz.report.coverage.diff import compare, diff_json, diff_lines

    if others:
        raise InputError("--diff", "only together with --json")
    if len(sources) != 2:
        raise InputError("--diff", f"compares two sources, got {len(sources)}")
    found = compare(*(coverage_from([source]) for source in sources))
    if as_json:
        sys.stdout.write(diff_json(found).decode())
    else:
        for line in diff_lines(found, output_width()):
            print(line)
    return EXIT_DISAGREE if found.lost else EXIT_OK


def _print_case(sources: list[Path], where: str) -> int:
    from emufuzz.case.json import case_to_json
    from emufuzz.cli.coverage_sources import case_at, is_campaign

    if len(sources) != 1 or not is_campaign(sources[0]):
        raise InputError("--case", "needs one campaign")
    print(case_to_json(case_at(sources[0], where)).decode())
    return EXIT_OK


def _print(found: Coverage, *, as_csv: bool, as_json: bool) -> None:
    if as_json:
        from emufuzz.report.coverage.document import to_json

        sys.stdout.write(to_json(found).decode())
    elif as_csv:
        from emufuzz.report.coverage.text import coverage_csv

        for line in coverage_csv(found):
            sys.stdout.write(line)
    else:
        from emufuzz.report.columns import output_width
        from emufuzz.report.coverage.text import coverage_lines

        for line in coverage_lines(found, output_width()):
            print(line)


def _leaf_limit(found: Coverage) -> dict[str, tuple[int, int]]:
    from emufuzz.report.coverage.reach import leaf_share

    return {"LEAF": leaf_share(found)}


def _measure(
    sources: list[Path], wanted: list[tuple[str, Path]], *, quiet: bool
) -> dict[str, tuple[int, int]]:
    """Line and branch coverage: written as asked for, and as (part, whole)."""
    from emufuzz.cli.coverage_sources import cases_from
    from emufuzz.cli.progress import counted
    from emufuzz.fuzz.files import reason_of
    from emufuzz.report.coverage.lines import Lines, LinesError, measure

    shares: dict[str, tuple[int, int]] = {}

    def use(lines: Lines) -> None:
        total = lines.total()
        shares["LINE"] = total.lines, total.all_lines
        shares["BRANCH"] = total.branches, total.all_branches
        if not quiet:
            print()
            for name, share in {**lines.packages(), "together": total}.items():
                print(_lines_text(name, share))
        for form, path in wanted:
            try:
                lines.write(form, path)
            except OSError as error:
                raise InputError("--lines", f"{path}: {reason_of(error)}") from error

    try:
        measure((case for _, case in counted(cases_from(sources))), use)
    except LinesError as error:
        raise InputError("--lines", str(error)) from error
    return shares


def _lines_text(name: str, share: Share) -> str:
    from emufuzz.report.coverage.text import percent

    lines = f"{share.lines:,} of {share.all_lines:,} lines ({percent(share.lines, share.all_lines)})"
    branches = f"{share.branches:,} of {share.all_branches:,} branches"
    return f"{name:<10}{lines}, {branches} ({percent(share.branches, share.all_branches)})"


def _judge(limits: dict[str, float], shares: dict[str, tuple[int, int]]) -> int:
    """Whether every limit is reached; says on stderr which is not."""
    code = EXIT_OK
    for name, limit in limits.items():
        part, whole = shares[name]
        reached = 100 * part / whole if whole else 100.0
        if reached < limit:
            print(f"emufuzz: {name}: {reached:.2f} % is under {limit:g} %", file=sys.stderr)
            code = EXIT_DISAGREE
    return code
