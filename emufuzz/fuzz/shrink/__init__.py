"""Shrinking: the simplest case that is still the same finding (docs/shrinking.md)."""

from __future__ import annotations

from emufuzz.fuzz.shrink.fields import non_default_fields
from emufuzz.fuzz.shrink.probe import Limits
from emufuzz.fuzz.shrink.run import PassLog, Shrunk, shrink, shrinking_to_obj

__all__ = ["Limits", "PassLog", "Shrunk", "non_default_fields", "shrink", "shrinking_to_obj"]
