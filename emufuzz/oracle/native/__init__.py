"""The host's processor as an oracle for code at CPL 3."""

from __future__ import annotations

from emufuzz.oracle.native.oracle import NativeOracle

__all__ = ["NativeOracle"]
