"""`emufuzz oracles`: which judges there are, whether they work here, and what each does not vouch for."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from emufuzz.cli.errors import EXIT_OK, EXIT_UNAVAILABLE, InputError

if TYPE_CHECKING:
    from emufuzz.oracle.gaps import Gap

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command("oracles")
def oracles(
    name: Annotated[str, typer.Argument(help="Show only this one, with all of its gaps.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> int:
    """List the oracles. Each is started, which runs its probes and self-test; `cmd:PROGRAM` works too.

    Exit code: 0, or 4 if the one that is asked for cannot work here.
    """
    from emufuzz.oracle.registry import ORACLES, UnknownOracleError, check_name

    try:
        names = [name] if name else list(ORACLES)
        for spec in names:
            check_name(spec)
    except UnknownOracleError as error:
        raise InputError("NAME", str(error)) from error
    found = [_describe(spec, gaps=bool(name) or as_json) for spec in names]
    if as_json:
        print(json.dumps(found[0] if name else found))
    else:
        for each in found:
            _print(each)
    return EXIT_UNAVAILABLE if name and not found[0]["available"] else EXIT_OK


def _describe(name: str, *, gaps: bool) -> dict[str, Any]:
    """An oracle as JSON values."""
    from emufuzz.oracle.base import OracleUnavailableError
    from emufuzz.oracle.registry import ORACLES, attached_gaps, open_oracle

    entry = ORACLES.get(name)
    about: dict[str, Any] = {"name": name, "about": entry.about if entry else "", "available": False}
    try:
        oracle = open_oracle(name)
    except (OracleUnavailableError, ModuleNotFoundError) as error:
        return {**about, "reason": str(error)}
    ledger = {gap.id: _gap_to_obj(gap) for gap in oracle.ledger}
    for gap_id, reason in attached_gaps(name).items():
        ledger.setdefault(gap_id, _met_to_obj(gap_id, reason, oracle.name))
    about["gaps"] = len(ledger)
    if gaps:
        about["ledger"] = list(ledger.values())
    can = oracle.capabilities
    about |= {
        "available": True,
        "fingerprint": oracle.fingerprint(),
        "modes": sorted(can.modes),
        "cpls": sorted(can.cpls),
        "takes": [
            word
            for word, flag in (
                ("phys", can.physical), ("devices", can.devices), ("count", can.count), ("paths", can.paths)
            )
            if flag
        ],
        "cost": can.cost,
    }  # fmt: skip
    oracle.close()
    return about


def _gap_to_obj(gap: Gap) -> dict[str, Any]:
    return {
        "id": gap.id, "oracle": gap.oracle, "versions": gap.versions, "fields": list(gap.fields),
        "reason": gap.reason, "reference": gap.reference,
    }  # fmt: skip


def _met_to_obj(gap_id: str, reason: str, oracle: str) -> dict[str, Any]:
    """A gap that has no condition: the oracle meets it while a case runs."""
    return {
        "id": gap_id, "oracle": oracle, "versions": "", "fields": ["all"],
        "reason": reason, "reference": "met while a case runs",
    }  # fmt: skip


def _print(about: dict[str, Any]) -> None:
    print(f"{about['name']}: {about['about']}" if about["about"] else about["name"])
    if not about["available"]:
        print(f"  not available: {about['reason']}")
    else:
        fingerprint = ", ".join(f"{k} {v}" for k, v in about["fingerprint"].items() if k != "oracle")
        print(f"  {fingerprint}")
        levels = " ".join(map(str, about["cpls"]))
        takes = f"; takes {', '.join(about['takes'])}" if about["takes"] else ""
        print(f"  modes {' '.join(about['modes'])}; CPL {levels}{takes}; {about['cost']}")
    if "gaps" in about:
        print(f"  {about['gaps']} known gaps")
    for gap in about.get("ledger", ()):
        print(f"    {gap['id']} ({', '.join(gap['fields'])}): {gap['reason']} [{gap['reference']}]")
