"""How far a long reading of cases is: a line on standard error, if that is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

T = TypeVar("T")

#: Seconds before there is a line, as who waits no longer needs none, and between two changes of it.
_PERIOD: Final = 0.5
#: Cases between two looks at the clock.
_STEP: Final = 16


class CountLine:
    """A count on the terminal, for as long as the `with` lasts; the line is gone afterwards."""

    def __init__(self, what: str = "cases", *, printing: bool = False) -> None:
        """Nothing is shown before `add`.

        Args:
            what: What is counted.
            printing: Whether something is printed meanwhile: where that goes to a terminal there is no
                line, as it says how far it is.
        """
        self._what = what
        self._count = 0
        self._shown = sys.stderr.isatty() and not (printing and sys.stdout.isatty())
        self._next = time.monotonic() + _PERIOD
        self._line: Progress | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._line is not None:
            self._line.stop()

    def add(self) -> None:
        """Count one more."""
        self._count += 1
        if self._shown and not self._count % _STEP and time.monotonic() >= self._next:
            self._show()
            self._next = time.monotonic() + _PERIOD

    def _show(self) -> None:
        if self._line is None:
            self._line = _new_line(self._what)
        self._line.update(self._line.task_ids[0], completed=self._count, refresh=True)


def _new_line(what: str) -> Progress:
    """A line that nothing but `update` changes: no thread goes on with it when something fails."""
    from rich.console import Console
    from rich.progress import Progress, TextColumn

    text = TextColumn("{task.completed:,.0f} {task.description}")
    console = Console(stderr=True)
    line = Progress(text, console=console, transient=True, auto_refresh=False, redirect_stdout=False)
    line.add_task(what, total=None)
    line.start()
    return line


def counted(cases: Iterable[T], what: str = "cases") -> Iterator[T]:
    """The same cases, counted on the terminal while somebody uses them."""
    with CountLine(what) as line:
        for case in cases:
            yield case
            line.add()
