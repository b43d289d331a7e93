"""What holds for every test."""

from __future__ import annotations

import signal

from hypothesis import settings

# The same examples every time, however slow the machine is; `--hypothesis-profile=fresh` draws others.
settings.register_profile("fixed", deadline=None, derandomize=True)
settings.register_profile("fresh", deadline=None)
settings.load_profile("fixed")

# A shell that starts tests in the background has them, and all that they start, ignore Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
