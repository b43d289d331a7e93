"""The line that says how far a command is: on a terminal only, gone afterwards."""

from __future__ import annotations

import io
import sys

import pytest

from emufuzz.cli import progress
from emufuzz.cli.progress import CountLine, counted


class Terminal(io.StringIO):
    """A stream that says that it is a terminal."""

    encoding = "utf-8"

    def isatty(self):
        return True


def terminal_of(monkeypatch):
    """Standard error as a terminal, and no patience; in the test, as pytest replaces streams before it."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(progress, "_PERIOD", 0.0)
    monkeypatch.setenv("TERM", "xterm")
    return made


def test_a_terminal_sees_the_count(monkeypatch):
    terminal = terminal_of(monkeypatch)
    assert list(counted(range(5000))) == list(range(5000))
    shown = terminal.getvalue()
    assert "16 cases" in shown
    assert "4,992 cases" in shown
    assert shown.endswith("\x1b[2K")  # the line is erased


def test_the_line_ends_when_something_fails(monkeypatch):
    terminal = terminal_of(monkeypatch)

    def read():
        for number in counted(range(5000), "files"):
            if number == 100:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        read()
    shown = terminal.getvalue()
    assert "96 files" in shown
    assert shown.endswith("\x1b[2K")
    assert "\x1b[?25h" in shown  # the cursor is shown again


def test_nobody_waits_for_what_is_quick(monkeypatch):
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(progress, "_PERIOD", 60.0)
    assert len(list(counted(range(5000)))) == 5000
    assert terminal.getvalue() == ""


def test_where_no_terminal_is_nothing_is_shown(capsys, monkeypatch):
    monkeypatch.setattr(progress, "_PERIOD", 0.0)
    assert len(list(counted(range(100)))) == 100
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("printed_to_terminal", [True, False])
def test_what_prints_to_the_terminal_needs_no_line(monkeypatch, printed_to_terminal):
    terminal = terminal_of(monkeypatch)
    monkeypatch.setattr(sys, "stdout", Terminal() if printed_to_terminal else io.StringIO())
    with CountLine(printing=True) as line:
        for _ in range(100):
            line.add()
    assert ("96 cases" in terminal.getvalue()) != printed_to_terminal
