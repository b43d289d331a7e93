"""What a finding's file says that it was made with: oracles, and a seeded bug. It may come from anybody."""

from __future__ import annotations

from typing import Any

from emufuzz.case.errors import CaseError
from emufuzz.cli.documents import Document
from emufuzz.cli.errors import InputError
from emufuzz.cli.names import oracles_beside, refuse_programs
from emufuzz.fuzz.bugs import known_bugs
from emufuzz.fuzz.engines import PROGRAM

#: Characters of a name from a file that are shown.
_SHOWN = 40


def recorded_oracles(document: Document) -> tuple[str, ...]:
    """The oracles beside the first one that a finding was made with.

    Raises:
        InputError: One is a program, or there is no oracle of that name.
    """
    names = tuple(name for name in _ran(document.value, "oracles").split(",") if name)[1:]
    refuse_programs(names, document.where)
    try:
        return oracles_beside(",".join(names))
    except InputError as error:
        raise InputError(document.where, f"versions.oracles: {error.__cause__ or error}") from error


def recorded_program(document: Document) -> str:
    """The program that a finding is about, `cmd:` and its name; empty if it is about the port."""
    name = _ran(document.value, "subject")
    return name if name.startswith(PROGRAM) else ""


def recorded_bug(value: dict[str, Any]) -> str:
    """The bug that was seeded when a finding was made; empty without one.

    Raises:
        CaseError: There is no such bug.
    """
    name = _ran(value, "seed_bug")
    if name and name not in known_bugs():
        raise CaseError(f"versions.seed_bug: no bug {name[:_SHOWN]!r}")
    return name


def _ran(value: dict[str, Any], name: str) -> str:
    ran = value.get("versions")
    return str(ran.get(name, "")) if isinstance(ran, dict) else ""
