"""Time as a process has it: that in which it waits for a processor does not count.

On a machine with more to do than processors a process may stand still for minutes without hanging.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Final

_NANOSECONDS: Final = 1e9


class ProcessClock:
    """Seconds since the last `restart` in which a process ran, or waited for anything but a processor."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self.restart()

    def restart(self) -> None:
        """Begin at 0."""
        self._since = time.monotonic() - waited(self._pid)

    def seconds(self) -> float:
        """How long it is."""
        return time.monotonic() - self._since - waited(self._pid)


def waited(pid: int) -> float:
    """Seconds that a process's first thread was ready to run and had no processor, since its start.

    0 where the kernel does not say (Documentation/scheduler/sched-stats.rst), or the process is gone.
    """
    try:
        text = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii")
        return int(text.split()[1]) / _NANOSECONDS
    except (OSError, IndexError, ValueError):
        return 0.0
