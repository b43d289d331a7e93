"""Bochs, in a process of its own, as an oracle for all modes and privilege levels."""

from __future__ import annotations

from emufuzz.oracle.bochs.oracle import BochsOracle

__all__ = ["BochsOracle"]
