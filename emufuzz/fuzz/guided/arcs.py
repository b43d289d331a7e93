"""Which line arcs of emulator/ and kvm/ one case takes: (from line, to line) within a function.

The subject runs the case once more with every line reported: by sys.monitoring where Python has it
(PEP 669, 3.12), else by sys.settrace. That is many times slower than a run without, so callers choose
few cases. The arcs are a function of the case and of the Python version alone.
"""

from __future__ import annotations

import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, Final

import emufuzz
from emufuzz.case.model import Case
from emufuzz.subject.base import Subject

#: Packages whose lines count.
PACKAGES: Final = ("emulator", "kvm")
#: Lines after which the rest of a long run is not looked at.
MOST_LINES: Final = 50_000

_ROOT: Final = Path(emufuzz.__file__).parent
_PREFIXES: Final = tuple(f"{_ROOT / package}/" for package in PACKAGES)
#: Lines of a module are numbered up to this; an arc's number is file, from, to.
_LINE_BITS: Final = 14
_LINE_MASK: Final = (1 << _LINE_BITS) - 1
_TOOL: Final = 4  # of those that PEP 669 leaves to anybody

#: File -> the upper bits of its arcs, 0 of files that do not count.
_bases: Final[dict[str, int]] = {}


def arcs_of(subject: Subject, case: Case) -> frozenset[int]:
    """The arcs that a run of the case takes, as numbers of at most 60 bits that are the same everywhere."""
    found: set[int] = set()
    with _tracing(found):
        subject.run((case,))
    return frozenset(found)


def arc_number(name: str, start: int, end: int) -> int:
    """The number of an arc; `name` is the file's, from the package on, `start` 0 where a function begins."""
    return _base_of_name(name) | (start & _LINE_MASK) << _LINE_BITS | end & _LINE_MASK


def _base_of_name(name: str) -> int:
    return (zlib.crc32(name.encode()) | 1) << 2 * _LINE_BITS


def _base_of(file: str) -> int:
    """The upper bits of a file's arcs; 0 if it does not count."""
    base = _bases.get(file)
    if base is None:
        counts = file.startswith(_PREFIXES)
        base = _base_of_name(str(Path(file).relative_to(_ROOT))) if counts else 0
        _bases[file] = base
    return base


@contextmanager
def _tracing(found: set[int]) -> Iterator[None]:
    if sys.version_info >= (3, 12) and sys.monitoring.get_tool(_TOOL) is None:
        with _monitored(found):
            yield
    else:
        with _traced(found):
            yield


# -- sys.settrace --------------------------------------------------------------------------------


@contextmanager
def _traced(found: set[int]) -> Iterator[None]:
    before = sys.gettrace()
    sys.settrace(_on_call(found))
    try:
        yield
    finally:
        sys.settrace(before)


def _on_call(found: set[int]) -> Callable[[FrameType, str, Any], Any]:
    """What hears of every function that begins."""
    left = MOST_LINES
    add = found.add

    def lines_of(base: int) -> Callable[[FrameType, str, Any], Any]:
        last = 0

        def on_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last, left
            if event == "line":
                line = frame.f_lineno
                add(base | last << _LINE_BITS | line)
                last = line
                left -= 1
                if left < 0:
                    sys.settrace(None)
                    return None
            return on_line

        return on_line

    def on_call(frame: FrameType, _event: str, _: Any) -> Any:
        base = _base_of(frame.f_code.co_filename)
        return lines_of(base) if base and left >= 0 else None

    return on_call


# -- sys.monitoring ------------------------------------------------------------------------------


def _listeners(found: set[int], disable: object) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What hears of functions and of lines; files that do not count are `disable`d once heard of."""
    last: dict[CodeType, int] = {}
    left = MOST_LINES

    def begin(code: CodeType, _: int) -> Any:
        if not _base_of(code.co_filename):
            return disable
        last[code] = 0
        return None

    def line(code: CodeType, number: int) -> Any:
        nonlocal left
        base = _base_of(code.co_filename)
        if not base:
            return disable
        left -= 1
        if left >= 0:
            found.add(base | last.get(code, 0) << _LINE_BITS | number)
            last[code] = number
        return None

    return begin, line


if sys.version_info >= (3, 12):

    @contextmanager
    def _monitored(found: set[int]) -> Iterator[None]:
        monitoring = sys.monitoring
        events = monitoring.events
        monitoring.use_tool_id(_TOOL, "emufuzz")
        begin, line = _listeners(found, monitoring.DISABLE)
        monitoring.register_callback(_TOOL, events.PY_START, begin)
        monitoring.register_callback(_TOOL, events.LINE, line)
        monitoring.set_events(_TOOL, events.PY_START | events.LINE)
        try:
            yield
        finally:
            monitoring.set_events(_TOOL, 0)
            monitoring.restart_events()
            monitoring.free_tool_id(_TOOL)
