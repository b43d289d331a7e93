"""`emufuzz vectors check`: the emulator against what KVM's emulator was recorded to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from emufuzz.arch.leaves import FAMILIES
from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError
from emufuzz.report.columns import table
from emufuzz.subject.vectors import FamilyCount, check_vectors

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

DEFAULT_FILE = Path("tests/data/vectors/kvm-6.12.jsonl.zst")
SHOWN_IDS = 5


@app.callback()
def vectors() -> None:
    """Work with recorded vectors."""


@app.command("check")
def check(
    file: Annotated[Path, typer.Argument(help="Vector lines, plain or zstd.")] = DEFAULT_FILE,
    family: Annotated[list[str] | None, typer.Option(help="Only this family; may be repeated.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> int:
    """Compare the emulator with recorded vectors to the last bit, undefined flags and callbacks included.

    Exit code 0 if all are equal, 1 if any differs.
    """
    for name in family or ():
        if name not in FAMILIES:
            raise InputError("--family", f"{name} is unknown; expected one of {', '.join(FAMILIES)}")
    counts = check_vectors(file, frozenset(family or FAMILIES))
    if not counts:
        raise InputError(str(file), "no vectors in it" if not family else "no vectors of that family in it")
    print(_as_json(counts) if as_json else "\n".join(_lines(counts)))
    return EXIT_DISAGREE if any(count.different for count in counts.values()) else EXIT_OK


def _as_json(counts: dict[str, FamilyCount]) -> str:
    return json.dumps(
        {
            name: {
                "total": count.total,
                "equal": count.equal,
                "different": count.different,
                "refused": dict(count.refused),
                "ids": count.ids,
            }
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
            more = " ..." if len(count.ids) > SHOWN_IDS else ""
            lines.append(f"{name}: differing: {' '.join(count.ids[:SHOWN_IDS])}{more}")
    return lines
