"""Starting cases per family, for corpus/seeds: `python -m emufuzz.fuzz.seeds DIRECTORY` writes them.

Each family gets every one of its leaves before any twice, from numbered batches of a fixed seed.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from emufuzz.arch.leaves import FAMILIES, family_of
from emufuzz.case.json import case_to_json
from emufuzz.case.model import Case
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.shrink.memory import trim
from emufuzz.subject.flat import FlatSubject

SEED: Final = 2024
#: Cases per family, and batches that are looked through for them.
PER_FAMILY: Final = 40
_BATCHES: Final = 24
_BATCH_SIZE: Final = 2048


def seed_cases() -> dict[str, list[Case]]:
    """Family -> its cases; families that KVM refuses as a whole have none."""
    kept: dict[str, list[Case]] = {family: [] for family in FAMILIES}
    by_leaf: dict[str, list[Case]] = {}
    for case, leaf in _candidates():
        found = by_leaf.setdefault(leaf, [])
        if len(found) < PER_FAMILY:
            found.append(case)
    watcher = FlatSubject()
    for rounds in range(PER_FAMILY):
        for leaf in sorted(by_leaf):
            family = family_of(leaf)
            cases = kept[family]
            if rounds < len(by_leaf[leaf]) and len(cases) < PER_FAMILY:
                name = f"{family}-{len(cases)}-{leaf}"
                cases.append(msgspec.structs.replace(trim(by_leaf[leaf][rounds], watcher), id=name))
    return kept


def _candidates() -> Iterator[tuple[Case, str]]:
    """Cases that the emulator takes, with their leaves."""
    subject = FlatSubject(events=False)
    for number in range(_BATCHES):
        cases = generate_batch(SEED, number, _BATCH_SIZE)
        for case, outcome in zip(cases, subject.run(cases), strict=True):
            if outcome.rc in ("continue", "propagate_fault") and outcome.leaf and not outcome.crash:
                yield case, outcome.leaf


def write_seeds(directory: Path) -> int:
    """Write one file per family that has cases; gives the number of cases."""
    total = 0
    for family, cases in seed_cases().items():
        if cases:
            lines = [case_to_json(case) + b"\n" for case in cases]
            (directory / f"{family}.jsonl").write_bytes(b"".join(lines))
            total += len(cases)
    return total


if __name__ == "__main__":
    target = Path(sys.argv[1])
    sys.stdout.write(f"{write_seeds(target)} cases in {target}\n")
