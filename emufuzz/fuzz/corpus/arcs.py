"""Which arcs of emulator/ and kvm/ a case goes along: pairs of lines, one executed right after the other.

The arcs are those of coverage.py's branch measurement before it joins the lines of a statement: from the
line before in the same call, negative where a call begins or ends. Every branch that coverage.py counts
is one of them. They are traced with `sys.settrace`, for one case at a time, as coverage.py gathers arcs
but does not say whose they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Final, TypeAlias

import emufuzz

#: File below the package, line before, line.
Arc: TypeAlias = tuple[str, int, int]

#: Rooms whose arcs count.
ROOMS: Final = ("emulator", "kvm")
_TOP: Final = Path(emufuzz.__file__).parent


class ArcTracer:
    """Runs functions and tells the arcs that they went along.

    Not to be used while something else traces this thread: the other one would miss what happens here.
    """

    def __init__(self) -> None:
        #: co_filename -> name below the package, None for files that do not count.
        self._names: dict[str, str | None] = {}
        self._arcs: set[Arc] = set()
        self._files: frozenset[str] | None = None

    def run(self, function: Callable[[], Any], files: frozenset[str] | None = None) -> tuple[Any, set[Arc]]:
        """What the function returns, and the arcs it went along in these files, None = all."""
        self._arcs = arcs = set[Arc]()
        self._files = files
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            result = function()
        finally:
            sys.settrace(before)
        return result, arcs

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> Callable[..., Any] | None:
        """A call begins: trace its lines if its file counts."""
        code = frame.f_code
        try:
            name = self._names[code.co_filename]
        except KeyError:
            name = self._names[code.co_filename] = _name_of(code.co_filename)
        if name is None or (self._files is not None and name not in self._files):
            return None
        return _line_tracer(name, code.co_firstlineno, self._arcs.add)


def _line_tracer(name: str, first: int, add: Callable[[Arc], None]) -> Callable[..., Any]:
    last = -first

    def trace(frame: FrameType, event: str, _argument: Any) -> Callable[..., Any]:
        nonlocal last
        if event == "line":
            line = frame.f_lineno
            add((name, last, line))
            last = line
        elif event == "return":
            add((name, last, -first))
        return trace

    return trace


def _name_of(filename: str) -> str | None:
    path = Path(filename)
    if not path.is_relative_to(_TOP):
        return None
    name = path.relative_to(_TOP)
    return name.as_posix() if name.parts[0] in ROOMS else None
