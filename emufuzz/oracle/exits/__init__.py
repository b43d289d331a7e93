"""What an exit stands for where that is no instruction at RIP, by the SDM (docs/vouched.md)."""

from __future__ import annotations

from emufuzz.oracle.exits.oracle import ExitsOracle

__all__ = ["ExitsOracle"]
