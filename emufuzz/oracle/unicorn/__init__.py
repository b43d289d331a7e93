"""Unicorn as an oracle."""

from __future__ import annotations

from emufuzz.oracle.unicorn.oracle import UnicornOracle

__all__ = ["UnicornOracle"]
