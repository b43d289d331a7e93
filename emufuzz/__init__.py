"""emufuzz: find out, by machine, where x86 instruction emulators are wrong."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.1.0"
