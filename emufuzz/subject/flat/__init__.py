"""The port alone, with callbacks on flat memory (docs/case-format.md)."""

from __future__ import annotations

from emufuzz.subject.flat.subject import FlatSubject

__all__ = ["FlatSubject"]
