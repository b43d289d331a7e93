"""A Python exception of the thing under test as an outcome."""

from __future__ import annotations

import traceback
from pathlib import Path
from typing import Final

from emufuzz.case.model import Case, Outcome

_PACKAGE: Final = Path(__file__).parents[1]


def crashed(case: Case, error: Exception) -> Outcome:
    """An outcome that carries the exception and where in this package it was raised."""
    frames = []
    for frame in traceback.extract_tb(error.__traceback__):
        path = Path(frame.filename)
        if path.is_relative_to(_PACKAGE):
            frames.append(f"{path.relative_to(_PACKAGE)}:{frame.lineno} {frame.name}")
    text = "".join(traceback.format_exception_only(error)).strip()
    return Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, crash="\n".join([text, *frames]))
