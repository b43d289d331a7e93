"""What `emufuzz fuzz` shows: a live screen on a terminal, log lines or JSON lines otherwise, a summary."""

from __future__ import annotations

from emufuzz.cli.screen.screen import Screen
from emufuzz.cli.screen.summary import explanation, headline

__all__ = ["Screen", "explanation", "headline"]
