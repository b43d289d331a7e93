"""Features: what a case reached, as numbers. A case that has one that nobody had before is kept.

Cells (leaf, mode, CPL, outcome, path), verdicts (reasons of skips, buckets of findings, results of exit
paths) and arcs. Numbers have less than 63 bits, and are the same in every process.
"""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b

from emufuzz.fuzz.cells import CellKey

_MASK = (1 << 62) - 1
_OTHER = 1 << 61  # never set in the number of an arc


@lru_cache(maxsize=1 << 17)
def cell_feature(cell: CellKey) -> int:
    """The feature that a cell is."""
    return _number("cell", *map(str, cell))


def verdict_feature(kind: str, key: str) -> int:
    """The feature that a verdict is: `skipped` under a reason, a `finding`'s bucket, a path's `result`."""
    return _number(kind, key)


def _number(*parts: str) -> int:
    digest = blake2b("\0".join(parts).encode(errors="backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") & _MASK | _OTHER
