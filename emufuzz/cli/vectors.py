"""`emufuzz vectors`: the emulator against what KVM's emulator, or a processor, was recorded to do."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from emufuzz.arch.leaves import FAMILIES
from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError
from emufuzz.cli.vectors_import import import_files
from emufuzz.report.columns import table
from emufuzz.report.judged import JudgedCount, judge_vectors
from emufuzz.subject.fep_vectors import FepCount, check_fep
from emufuzz.subject.vectors import FamilyCount, check_vectors

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

DEFAULT_FILE = Path("tests/data/vectors/kvm-6.12.jsonl.zst")
SHOWN_IDS = 5
FEP = "fep"

Count = TypeVar("Count", FamilyCount, FepCount, JudgedCount)


@app.callback()
def vectors() -> None:
    """Work with recorded vectors."""


app.command("import")(import_files)


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="Vector lines, plain or zstd, or a MOO file.")] = DEFAULT_FILE,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated.")] = None,
    path: Annotated[
        str | None, typer.Option(help=f"Enter through KVM: {FEP}; default: the emulator alone.")
    ] = None,
    oracle: Annotated[
        bool, typer.Option("--oracle", help="Judge as by an oracle: leave out what is undefined.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Compare the emulator with recorded vectors to the last bit, undefined flags and callbacks included.

    With --path fep each vector enters KVM behind the forced-emulation prefix, and the table counts what
    KVM is known to do differently around the emulator (docs/kvm-vectors.md).

    With --oracle the vectors are those of a processor (docs/moo.md): flags that the SDM leaves undefined do
    not count, known quirks of KVM are counted, and callbacks are not compared.

    Exit code 0 if all are equal or explained, 1 if any differs.
    """
    if path not in (None, FEP):
        raise InputError("--path", f"{path} is unknown; expected {FEP}")
    for name in family or ():
        if name not in FAMILIES:
            raise InputError("--family", f"{name} is unknown; expected one of {', '.join(FAMILIES)}")
    if oracle and path is not None:
        raise InputError("--oracle", "cannot be given together with --path")
    families = frozenset(family or FAMILIES)
    if oracle:
        return _check_judged(file, families, as_json=as_json)
    if path == FEP:
        return _check_fep(file, families, as_json=as_json)
    counts = _some(check_vectors(file, families), file, families)
    print(_as_json(counts) if as_json else "\n".join(_lines(counts)))
    return EXIT_DISAGREE if any(count.different for count in counts.values()) else EXIT_OK


def _check_fep(file: Path, families: frozenset[str], *, as_json: bool) -> int:
    counts = _some(check_fep(file, families), file, families)
    print(_as_json(counts) if as_json else "\n".join(_fep_lines(counts)))
    return EXIT_DISAGREE if any(count.different for count in counts.values()) else EXIT_OK


def _check_judged(file: Path, families: frozenset[str], *, as_json: bool) -> int:
    counts = _some(judge_vectors(file, families), file, families)
    print(_judged_json(counts) if as_json else "\n".join(_judged_lines(counts)))
    return EXIT_DISAGREE if any(count.ids for count in counts.values()) else EXIT_OK


def _some(counts: dict[str, Count], file: Path, families: frozenset[str]) -> dict[str, Count]:
    """The counts, of which there must be some."""
    if not counts:
        raise InputError(
            str(file),
            "no vectors in it" if families == frozenset(FAMILIES) else "no vectors of that family in it",
        )
    return counts


def _as_json(counts: Mapping[str, FamilyCount | FepCount]) -> str:
    return json.dumps(
        {
            name: {**{f.name: getattr(count, f.name) for f in fields(count)}, "different": count.different}
            for name, count in counts.items()
        }
    )


def _lines(counts: dict[str, FamilyCount]) -> list[str]:
    """The table, then for each incomplete family why cases were refused and which ones differ."""
    rows = [(name, str(c.total), str(c.equal), str(c.different)) for name, c in counts.items()]
    total, equal = sum(c.total for c in counts.values()), sum(c.equal for c in counts.values())
    rows.append(("all", str(total), str(equal), str(total - equal)))
    lines = table(["family", "total", "equal", "different"], rows, 1000)
    for name, count in counts.items():
        lines += [f"{name}: {number} refused: {reason}" for reason, number in count.refused.most_common()]
        if count.ids:
            lines.append(_differing(name, count.ids))
    return lines


def _fep_lines(counts: dict[str, FepCount]) -> list[str]:
    """The table, then for each family which rules explain how many vectors and which ones differ."""
    rows = [(name, *map(str, _fep_numbers(count))) for name, count in counts.items()]
    totals = [sum(column) for column in zip(*map(_fep_numbers, counts.values()), strict=True)]
    rows.append(("all", *map(str, totals)))
    lines = table(["family", "total", "equal", "explained", "different"], rows, 1000)
    for name, count in counts.items():
        lines += [f"{name}: {number} explained: {rule}" for rule, number in count.rules.most_common()]
        if count.ids:
            lines.append(_differing(name, count.ids))
    return lines


def _fep_numbers(count: FepCount) -> tuple[int, int, int, int]:
    return count.total, count.equal, count.explained, count.different


def _judged_json(counts: dict[str, JudgedCount]) -> str:
    return json.dumps(
        {
            name: {
                "total": count.total,
                "agreed": count.agreed,
                "explained": dict(count.explained),
                "refused": dict(count.refused),
                "findings": count.ids,
            }
            for name, count in counts.items()
        }
    )


def _judged_lines(counts: dict[str, JudgedCount]) -> list[str]:
    """The table, then for each family quirks and refusals by reason, and which vectors are findings."""
    rows = [(name, *map(str, count.numbers)) for name, count in counts.items()]
    totals = [sum(column) for column in zip(*(count.numbers for count in counts.values()), strict=True)]
    rows.append(("all", *map(str, totals)))
    lines = table(["family", "total", "agreed", "explained", "refused", "findings"], rows, 1000)
    for name, count in counts.items():
        lines += [f"{name}: {number} explained: {reason}" for reason, number in count.explained.most_common()]
        lines += [f"{name}: {number} refused: {reason}" for reason, number in count.refused.most_common()]
        if count.ids:
            lines.append(_differing(name, count.ids))
    return lines


def _differing(family: str, ids: list[str]) -> str:
    more = " ..." if len(ids) > SHOWN_IDS else ""
    return f"{family}: differing: {' '.join(ids[:SHOWN_IDS])}{more}"
