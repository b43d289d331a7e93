"""Three ways to show a campaign: a live screen, log lines, JSON lines."""

from __future__ import annotations

from collections import deque
from typing import IO, Final, Protocol

import msgspec
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.segment import Segment

from emufuzz.cli.screen.events import Done, Found, Incident, Restart, Shrunk, Start, progress_of
from emufuzz.cli.screen.frame import frame
from emufuzz.cli.screen.summary import progress_line
from emufuzz.cli.screen.text import plural
from emufuzz.cli.screen.view import View
from emufuzz.report.plain import duration, printable

#: Seconds between two pictures, and between two lines about progress.
_FRAME: Final = 0.25
_LINE: Final = 5.0
#: What happened last, as far as a screen remembers it.
_LATEST: Final = 100


class Output(Protocol):
    """Where a campaign is shown.

    Attributes:
        every: Seconds between two calls of `progress`.
        words: Whether the summary at the end is for people.
    """

    every: float
    words: bool

    def start(self, event: Start) -> None:
        """The run begins."""

    def progress(self, view: View) -> None:
        """Show how far it is."""

    def incident(self, event: Incident) -> None:
        """Show what happened."""

    def stop(self) -> None:
        """The run is over, however it ended; called once after `start`."""

    def done(self, event: Done) -> None:
        """Show how it ended."""


class LiveScreen:
    """A picture that fills the terminal, and leaves it as it was."""

    every = _FRAME
    words = True

    def __init__(self, console: Console) -> None:
        self._live = Live(console=console, screen=True, auto_refresh=False)
        self._latest: deque[str] = deque(maxlen=_LATEST)

    def start(self, event: Start) -> None:  # noqa: ARG002 - the picture says it all the time
        """Take the terminal."""
        self._live.start()

    def progress(self, view: View) -> None:
        """Draw a picture."""
        self._live.update(_Picture(view, tuple(self._latest)), refresh=True)

    def incident(self, event: Incident) -> None:
        """Show it from the next picture on."""
        self._latest.append(f"{duration(event.elapsed)}  {_line(event)}")

    def stop(self) -> None:
        """Give the terminal back."""
        self._live.stop()

    def done(self, event: Done) -> None:
        """The summary says it."""


class _Picture:
    """The picture in the size that the terminal has when it is drawn."""

    def __init__(self, view: View, latest: tuple[str, ...]) -> None:
        self._view = view
        self._latest = latest

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        size = options.size
        lines = frame(self._view, self._latest, size.width, size.height, ascii_only=options.ascii_only)
        for i, line in enumerate(lines):
            if i:
                yield Segment.line()
            yield from line.render(console)


class LogLines:
    """Plain lines: what happens when it does, and progress from time to time."""

    every = _LINE
    words = True

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def start(self, event: Start) -> None:
        """A line about what runs."""
        config = event.config
        self._print(
            f"start    {config.subject} against {', '.join(config.oracles)}, seed {config.seed}, "
            f"{plural(event.workers, 'worker')}, {event.directory}"
        )

    def progress(self, view: View) -> None:
        """A line about progress."""
        self._print(progress_line(view))

    def incident(self, event: Incident) -> None:
        """A line about it."""
        self._print(_line(event))

    def stop(self) -> None:
        """There is nothing to give back."""

    def done(self, event: Done) -> None:
        """The summary says it."""

    def _print(self, text: str) -> None:
        self._stream.write(printable(text) + "\n")
        self._stream.flush()


class JsonLines:
    """One JSON object per line (docs/status.md), and nothing else."""

    every = _LINE
    words = False

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def start(self, event: Start) -> None:
        """Event `start`."""
        self._write(event)

    def progress(self, view: View) -> None:
        """Event `progress`."""
        self._write(progress_of(view))

    def incident(self, event: Incident) -> None:
        """The event."""
        self._write(event)

    def stop(self) -> None:
        """Event `done` says it."""

    def done(self, event: Done) -> None:
        """Event `done`."""
        self._write(event)

    def _write(self, event: msgspec.Struct) -> None:
        self._stream.write(msgspec.json.encode(event).decode() + "\n")
        self._stream.flush()


_WORDS: Final = {Found: "finding", Shrunk: "shrunk", Restart: "restart"}


def _line(event: Incident) -> str:
    return f"{_WORDS.get(type(event), 'retry'):<8} {event.text}"


def output_for(stream: IO[str], *, as_json: bool) -> Output:
    """JSON lines where they are asked for, a live screen on a terminal that can show one, else log lines."""
    if as_json:
        return JsonLines(stream)
    console = Console(file=stream)
    if stream.isatty() and not console.is_dumb_terminal:
        return LiveScreen(console)
    return LogLines(stream)
