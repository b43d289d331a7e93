"""Findings: disagreements, crashes and hangs, and the buckets that they are deduplicated by."""

from __future__ import annotations

import re
from typing import Final, NamedTuple
from zlib import crc32

import msgspec

from emufuzz.arch.leaves import LEAVES
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.compare import Difference

#: Whom a finding stands against: every oracle that vouches, some of them, or nobody, as it failed.
ALONE: Final = "alone"
SPLIT: Final = "split"
FAILED: Final = "failed"

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_.=~-]+")
_LONGEST_LEAF: Final = 48


class Bucket(NamedTuple):
    """What findings are deduplicated by.

    Attributes:
        leaf: The leaf of the opcode tables; empty if the instruction was not decoded.
        place: The mode, behind the exit path if there is one.
        kind: The kind of the first difference.
        verdict: ALONE, SPLIT or FAILED.
    """

    leaf: str
    place: str
    kind: str
    verdict: str

    @property
    def name(self) -> str:
        """The bucket as a file name without suffix; only what is not ALONE says so."""
        last = () if self.verdict == ALONE else (self.verdict,)
        return _UNSAFE.sub("_", "-".join((_leaf_name(self.leaf), self.place, self.kind, *last)))


def _leaf_name(leaf: str) -> str:
    """A leaf in a file name; leaves that the opcode tables do not have are told apart by their CRC."""
    name = _UNSAFE.sub("_", leaf.replace("!", "not"))
    if leaf in LEAVES:
        return name
    return f"{name[:_LONGEST_LEAF]}~{crc32(leaf.encode()):08x}" if leaf else "undecoded"


def place_of(case: Case) -> str:
    """Where a case runs: its mode, behind its exit path if it has one."""
    return case.mode if case.path is None else f"{case.path}-{case.mode}"


class Finding(msgspec.Struct):
    """A disagreement, crash or hang: the first case of its bucket, and what each side made of it.

    `subject` and `oracle` are None where they did not finish. `verdict` is one of ALONE, SPLIT and
    FAILED, `sentence` says in words who disagrees; `index` is the case's place in its batch.
    """

    leaf: str
    kind: str
    verdict: str
    batch: int
    index: int
    case: Case
    differences: tuple[Difference, ...]
    subject: Outcome | None = None
    oracle: Outcome | None = None
    sentence: str = ""

    @property
    def bucket(self) -> Bucket:
        """What the finding is deduplicated by."""
        return Bucket(self.leaf, place_of(self.case), self.kind, self.verdict)
