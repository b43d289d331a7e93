"""`emufuzz handlers`: the same instructions through KVM's exit handlers and through its emulator."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from emufuzz.case.json import case_to_json
from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError

if TYPE_CHECKING:
    from emufuzz.fuzz.handlers.differential import Unexplained

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

DEFAULT_CASES = 20000
DEFAULT_OUT = Path("emufuzz-handlers")
_SHOWN = 20


@app.command("handlers")
def handlers(
    cases: Annotated[int, typer.Option(help="Stop after so many cases.")] = DEFAULT_CASES,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the generated cases.")] = 1,
    out: Annotated[Path, typer.Option(help="Directory for cases that nothing explains.")] = DEFAULT_OUT,
) -> int:
    """Compare KVM's exit handlers with its emulator on instructions that exit.

    Every difference must be of a kind that docs/kvm-handlers.md gives the reason of. One that is not is
    written to OUT, as two lines that `emufuzz exec --engine kvm` takes: the case as hardware exits for it,
    and the case with the forced-emulation prefix. Exit code: 0 = all explained, 1 = not, 2 = bad input.
    """
    from emufuzz.fuzz.handlers.differential import run

    if not 0 < cases <= 1 << 32:
        raise InputError("--cases", f"must be 1 to {1 << 32}, got {cases}")
    totals = run(seed, range(cases))
    print("\n".join(totals.lines()))
    if not totals.unexplained:
        return EXIT_OK
    print("\nunexplained:")
    out.mkdir(parents=True, exist_ok=True)
    for found in totals.unexplained:
        _save(out, found)
    for found in totals.unexplained[:_SHOWN]:
        fields = " ".join(found.verdict.unexplained)
        print(f"  {out / found.case.id}.jsonl  {found.kind}  {fields}  (rules: {_names(found)})")
    if len(totals.unexplained) > _SHOWN:
        print(f"  and {len(totals.unexplained) - _SHOWN} more")
    return EXIT_DISAGREE


def _names(found: Unexplained) -> str:
    return ", ".join(found.verdict.rules) or "none"


def _save(out: Path, found: Unexplained) -> None:
    """The case both ways."""
    from emufuzz.fuzz.handlers.observe import with_prefix

    lines = (case_to_json(found.case), case_to_json(with_prefix(found.case)))
    (out / f"{found.case.id}.jsonl").write_bytes(b"".join(_bytes(line) + b"\n" for line in lines))


def _bytes(line: str | bytes) -> bytes:
    return line if isinstance(line, bytes) else line.encode()
