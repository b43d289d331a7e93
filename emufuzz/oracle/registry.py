"""Oracles by the names that users give them: `unicorn`, `rules`, `vectors:FILE`, `cmd:PROGRAM` and others."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Final, NamedTuple

from emufuzz.oracle.base import Oracle, OracleUnavailableError
from emufuzz.oracle.command import CommandOracle
from emufuzz.oracle.vectors import VectorsOracle


class Entry(NamedTuple):
    """An oracle that comes with the package: where its class is, and what it is."""

    module: str
    name: str
    about: str


# fmt: off
ORACLES: Final = {
    "unicorn": Entry("emufuzz.oracle.unicorn", "UnicornOracle",
                     "Unicorn: results of nearly everything, few checks"),
    "native":  Entry("emufuzz.oracle.native",  "NativeOracle",
                     "this host's processor: code at CPL 3, with its limits, types and faults"),
    "bochs":   Entry("emufuzz.oracle.bochs",   "BochsOracle",
                     "Bochs: all modes and levels, nearly every check; needs the extra emufuzz[bochs]"),
    "exits":   Entry("emufuzz.oracle.exits",   "ExitsOracle",
                     "models of what VM exits stand for beyond the instruction: events, tasks, userspace"),
    "rules":   Entry("emufuzz.oracle.rules",   "RulesOracle",
                     "the SDM's demands: what must fault, and what a fault must leave alone"),
}
# fmt: on

#: Oracle -> the module with its ATTACHED, id -> reason of the gaps that only a run shows.
_ATTACHED: Final = {
    "unicorn": "emufuzz.oracle.unicorn.ledger",
    "native": "emufuzz.oracle.native.gaps",
    "bochs": "emufuzz.oracle.bochs.gaps",
    "exits": "emufuzz.oracle.exits.run",
    "rules": "emufuzz.oracle.rules.oracle",
}

#: Oracles that take an argument: prefix -> what follows it.
PREFIXES: Final = {"vectors:": "a file of recorded vectors", "cmd:": "a command line (docs/command.md)"}


class UnknownOracleError(ValueError):
    """There is no oracle of that name; the message lists those that there are."""


def check_name(spec: str) -> None:
    """Raise UnknownOracleError unless `spec` names an oracle."""
    if spec in ORACLES or any(spec.startswith(prefix) and spec != prefix for prefix in PREFIXES):
        return
    known = ", ".join((*ORACLES, *(f"{prefix}..." for prefix in PREFIXES)))
    raise UnknownOracleError(f"no oracle {spec!r}, known are {known}")


def oracle_factory(spec: str) -> Callable[[], Oracle]:
    """What opens the oracle of that name.

    Raises:
        UnknownOracleError: There is none.
    """
    check_name(spec)
    if spec.startswith("vectors:"):
        return lambda: VectorsOracle([Path(spec.removeprefix("vectors:"))])
    if spec.startswith("cmd:"):
        return lambda: CommandOracle(spec.removeprefix("cmd:"))
    entry = ORACLES[spec]
    factory: Callable[[], Oracle] = getattr(import_module(entry.module), entry.name)
    return factory


def open_oracle(spec: str) -> Oracle:
    """The oracle of that name, self-tested.

    Raises:
        UnknownOracleError: There is none.
        OracleUnavailableError: It cannot work here.
    """
    return oracle_factory(spec)()


def attached_gaps(spec: str) -> dict[str, str]:
    """Gaps that only a run shows, and that an oracle attaches to an outcome: id -> reason."""
    if spec not in _ATTACHED:
        return {}
    return dict(import_module(_ATTACHED[spec]).ATTACHED)


def gap_reasons() -> dict[str, str]:
    """Id -> reason of every gap of the oracles that come with the package, available here or not."""
    from emufuzz.oracle.bochs.gaps import BOCHS_GAPS  # noqa: PLC0415 - only for reports
    from emufuzz.oracle.native.gaps import native_gaps  # noqa: PLC0415
    from emufuzz.oracle.native.host import Host  # noqa: PLC0415
    from emufuzz.oracle.unicorn.ledger import LEDGER  # noqa: PLC0415

    any_host = Host("", 0, 0, 0, "", frozenset())
    known = {gap.id: gap.reason for gap in (*LEDGER, *BOCHS_GAPS, *native_gaps(any_host))}
    for spec in _ATTACHED:
        known |= attached_gaps(spec)
    return known


def why_unavailable(spec: str) -> str:
    """Why an oracle cannot work here; empty if it can."""
    try:
        open_oracle(spec).close()
    except OracleUnavailableError as error:
        return str(error)
    return ""
