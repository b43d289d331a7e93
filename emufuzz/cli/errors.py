"""How commands end: exit codes, and the one line that a user sees instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from emufuzz.case.errors import CaseError, UnsupportedCaseError

EXIT_OK: Final = 0
EXIT_DISAGREE: Final = 1  # a disagreement, or new findings
EXIT_BAD_INPUT: Final = 2
EXIT_CHANGED: Final = 3  # a different disagreement than the recorded one
EXIT_UNAVAILABLE: Final = 4
EXIT_BUG: Final = 70  # EX_SOFTWARE: emufuzz itself failed
EXIT_INTERRUPTED: Final = 130  # 128 + SIGINT
EXIT_BROKEN_PIPE: Final = 141  # 128 + SIGPIPE


class InputError(Exception):
    """Bad input from the user: which file (and line) it is in, and what is wrong with it."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)


def one_line(exc: BaseException) -> str:
    """The message of an error a user caused, on one line and of bounded length."""
    text = _os_error(exc) if isinstance(exc, OSError) else str(exc)
    text = " ".join(text.split()) or type(exc).__name__
    return text if len(text) <= 500 else text[:497] + "..."


def _os_error(exc: OSError) -> str:
    reason = (exc.strerror or str(exc)).lower()
    return f"{exc.filename}: {reason}" if exc.filename is not None else reason


def exit_code(exc: BaseException) -> int | None:
    """The exit code of an expected error, None for one that is a bug of emufuzz."""
    from emufuzz.oracle.base import OracleUnavailableError

    if isinstance(exc, OracleUnavailableError):
        return EXIT_UNAVAILABLE
    if isinstance(exc, InputError | CaseError | UnsupportedCaseError | OSError):
        return EXIT_BAD_INPUT
    return None


@contextmanager
def at(where: str) -> Iterator[None]:
    """Have the expected errors name the place of what is being read or run.

    Raises:
        InputError: Something is wrong with it; one that comes from inside names its place already.
        OracleUnavailableError: An oracle cannot work here.
    """
    from emufuzz.oracle.base import OracleUnavailableError

    try:
        yield
    except (InputError, BrokenPipeError):
        raise
    except OracleUnavailableError as error:
        raise OracleUnavailableError(f"{where}: {error}") from error
    except (CaseError, UnsupportedCaseError, OSError) as error:
        raise InputError(where, one_line(error)) from error


@contextmanager
def reported(failed: Callable[[int], None]) -> Iterator[None]:
    """Say an expected error in one line, hand its exit code to `failed`, and go on with what follows."""
    try:
        yield
    except BrokenPipeError:
        raise
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        print(f"emufuzz: {one_line(error)}", file=sys.stderr)
        failed(code)
