"""Names of oracles, modes and exit paths on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from emufuzz.arch.modes import MODES
from emufuzz.case.paths import PATHS
from emufuzz.cli.errors import InputError

FIRST_ORACLE: Final = "unicorn"
_PROGRAM: Final = "cmd:"


def oracles_beside(text: str) -> tuple[str, ...]:
    """The oracles that `--oracles` names, without Unicorn, which is always asked.

    Raises:
        InputError: There is no oracle of some name.
    """
    from emufuzz.oracle.registry import UnknownOracleError, check_name

    names = [name.strip() for name in text.split(",") if name.strip()]
    try:
        for name in names:
            check_name(name)
    except UnknownOracleError as error:
        raise InputError("--oracles", str(error)) from error
    return tuple(dict.fromkeys(name for name in names if name != FIRST_ORACLE))


def default_oracles() -> tuple[str, ...]:
    """Unicorn, and every other oracle that works here."""
    from emufuzz.oracle.registry import ORACLES, why_unavailable

    return tuple(name for name in ORACLES if name == FIRST_ORACLE or not why_unavailable(name))


def refuse_programs(names: Iterable[str], where: str, what: str = "oracle") -> None:
    """Raise InputError if a file that may come from anybody names a program to run.

    Args:
        names: Names of oracles, or of a subject.
        where: The file that has them.
        what: `oracle` or `subject`.
    """
    option = "--subject" if what == "subject" else "--oracles"
    for name in names:
        if name.startswith(_PROGRAM):
            raise InputError(where, f"its {what} {name!r} is a program: {option} has to name it to run it")


def chosen_paths(text: str | None) -> tuple[str, ...]:
    """The exit paths that `--paths` names, in the order of PATHS; all without it.

    Raises:
        InputError: There is no path of some name, or none is named.
    """
    return PATHS if text is None else chosen_names("--paths", "path", text, PATHS)


def chosen_modes(text: str) -> tuple[str, ...]:
    """The modes that `--modes` names, in the order of MODES.

    Raises:
        InputError: There is no mode of some name, or none is named.
    """
    return chosen_names("--modes", "mode", text, MODES)


def chosen_names(option: str, what: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a comma-separated list, in the order of the known ones.

    Raises:
        InputError: `option` names something else, or nothing.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InputError(option, f"unknown {what} {name!r}, known are {', '.join(known)}")
    if not names:
        raise InputError(option, f"names no {what}")
    return tuple(each for each in known if each in names)
