"""`emufuzz vouch`: how much of what instructions do has an oracle that stands for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emufuzz.arch.modes import MODES
from emufuzz.cli.errors import EXIT_DISAGREE, EXIT_OK, InputError
from emufuzz.cli.names import FIRST_ORACLE, chosen_modes, chosen_paths, default_oracles, oracles_beside

if TYPE_CHECKING:
    from emufuzz.fuzz.generate import Options
    from emufuzz.fuzz.vouched import Vouched

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)

SUBJECTS = {"emulator": ("emulator",), "kvm": ("kvm",), "both": ("emulator", "kvm")}


@app.command("vouch")
def vouch(
    cases: Annotated[int, typer.Option(min=1, help="So many cases, half of them per subject.")] = 10000,
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of the generated cases.")] = 1,
    subject: Annotated[str, typer.Option(help="emulator (flat memory), kvm (exit paths), or both.")] = "both",
    oracles: Annotated[
        str, typer.Option(help="Comma-separated oracles, unicorn among them; all that work here by default.")
    ] = "",
    modes: Annotated[str, typer.Option(help="Comma-separated CPU modes.")] = ",".join(MODES),
    paths: Annotated[
        str | None, typer.Option(help="Comma-separated exit paths into KVM; all by default.")
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Worker processes.")] = 1,
    keep: Annotated[
        Path | None, typer.Option(help="File for the counts on the way: the same run goes on from there.")
    ] = None,
    top: Annotated[int, typer.Option(min=0, help="Rows per table.")] = 20,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, with every row.")] = False,
) -> int:
    """Generate cases, ask all oracles, and count the changed fields for which none of them vouches.

    Depends on seed and number of cases only. Exit code: 1 if there were findings.
    """
    from emufuzz.fuzz.vouch import count_tasks, tasks_of
    from emufuzz.fuzz.vouch_file import save

    if subject not in SUBJECTS:
        raise InputError("--subject", f"unknown subject {subject!r}, known are {', '.join(SUBJECTS)}")
    if paths is not None and subject == "emulator":
        raise InputError("--paths", "only --subject kvm has exit paths")
    options = _options(modes, paths)
    others = _others(oracles)
    tasks = tasks_of(SUBJECTS[subject], seed, cases, options)
    run = {"cases": cases, "seed": seed, "subject": subject, "oracles": list(others)}
    run |= {"modes": modes, "paths": paths}
    done, total = _kept(keep, run)
    for number, part in enumerate(count_tasks(tasks[done:], others, workers), done + 1):
        total.merge(part)
        if keep is not None:
            save(keep, run, number, total)
    print(json.dumps(to_json(total)) if as_json else "\n".join(lines(total, top)))
    return EXIT_DISAGREE if total.classes["finding"] else EXIT_OK


def _kept(keep: Path | None, run: dict[str, Any]) -> tuple[int, Vouched]:
    """Batches that are counted already, and their counts."""
    from emufuzz.fuzz.vouch_file import VouchFileError, load
    from emufuzz.fuzz.vouched import Vouched

    if keep is None:
        return 0, Vouched()
    try:
        return load(keep, run)
    except VouchFileError as error:
        raise InputError(str(keep), str(error)) from error


def _others(text: str) -> tuple[str, ...]:
    """The oracles beside the first one: those named, or all that work here."""
    if not text:
        return default_oracles()[1:]
    if FIRST_ORACLE not in text.split(","):
        raise InputError("--oracles", f"{FIRST_ORACLE} has to be among them")
    return oracles_beside(text)


def _options(modes: str, paths: str | None) -> dict[str, Options]:
    from emufuzz.fuzz.generate import Options
    from emufuzz.fuzz.kvm.generate import PathOptions, possible_paths

    chosen = chosen_modes(modes)
    possible = possible_paths(chosen_paths(paths), chosen)
    if not possible:
        raise InputError("--paths", f"none of them exists in the modes {', '.join(chosen)}")
    return {"emulator": Options(chosen), "kvm": PathOptions(chosen, 1, possible)}


def lines(total: Vouched, top: int) -> list[str]:
    """The report for people; `top` rows per table."""
    from emufuzz.fuzz.vouched import CLASSES

    shown = [f"{total.cases} cases"]
    shown += [f"  {total.classes[name]:9} {name:9} {what}" for name, what in CLASSES.items()]
    changed, nobody = total.fields.total(), total.unvouched.total()
    shown += [f"{changed} changed fields, {nobody} that nobody vouches for: {total.share:.2%}"]
    if total.undefined:
        shown += [f"{total.undefined.total()} more that the SDM leaves undefined, which do not count"]
    shown += ["", "vouched for by      fields   by it alone   cases asked"]
    shown += [
        f"  {name:12} {total.by[name]:12} {total.alone[name]:13} {total.asked.get(name, '-'):>13}"
        for name in sorted(total.by)
    ]
    for title, rows in (
        ("by path", total.table(0)),
        ("by leaf", total.table(1)),
        ("by kind of field", total.table(2)),
    ):
        shown += ["", f"{title:34} fields  unvouched   share  because of"]
        shown += [_row(*row) for row in rows[:top]]
    shown += ["", "cases that are neither agreed nor findings"]
    shown += [f"{count:8}  {kind}: {reason}" for (kind, reason), count in total.reasons.most_common(top)]
    return shown


def _row(name: str, fields: int, unvouched: int, causes: dict[str, int]) -> str:
    why = ", ".join(f"{cause} ({count})" for cause, count in list(causes.items())[:3])
    return f"  {name:28} {fields:10} {unvouched:10} {unvouched / fields:7.2%}  {why}"


def to_json(total: Vouched) -> dict[str, Any]:
    """Everything that was counted as JSON values."""
    tables = {"paths": total.table(0), "leaves": total.table(1), "kinds": total.table(2)}
    return {
        "cases": total.cases,
        "classes": dict(total.classes),
        "reasons": [
            {"class": kind, "reason": reason, "cases": count}
            for (kind, reason), count in sorted(total.reasons.items())
        ],
        "fields": total.fields.total(),
        "unvouched": total.unvouched.total(),
        "share": round(total.share, 6),
        "undefined": dict(sorted(total.undefined.items())),
        "oracles": {
            name: {"vouched": total.by[name], "alone": total.alone[name], "asked": total.asked.get(name)}
            for name in sorted(total.by)
        },
        **{
            title: [
                {"name": name, "fields": fields, "unvouched": unvouched, "causes": causes}
                for name, fields, unvouched, causes in rows
            ]
            for title, rows in tables.items()
        },
    }
