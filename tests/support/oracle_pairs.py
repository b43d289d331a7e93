"""Two oracles on the same generated cases: what they disagree on must be in the ledger of one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from emufuzz.arch.modes import MODES
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.bochs.state import cpl_of
from emufuzz.oracle.compare import Difference, agree, compare
from emufuzz.oracle.gaps import covers
from emufuzz.subject.flat import FlatSubject


def taken_by(oracles: Sequence[Oracle], cases: Sequence[Case]) -> list[Case]:
    """The cases that all of them take."""
    found = []
    for case in cases:
        if all(cpl_of(case.system, case.mode) in oracle.capabilities.cpls for oracle in oracles):
            with suppress(UnsupportedCaseError):
                for oracle in oracles:
                    oracle.check(case)
                found.append(case)
    return found


def cases_for(
    oracles: Sequence[Oracle], seed: int, count: int, *, states: int = 1, modes: Sequence[str] = MODES
) -> Iterator[list[Case]]:
    """Batches of generated cases that all oracles take, `count` in all."""
    known = tuple(m for m in modes if all(m in oracle.capabilities.modes for oracle in oracles))
    number = 0
    while count > 0:
        batch = generate_batch(seed, number, 1024, Options(modes=known, states=states))
        cases = taken_by(oracles, batch)[:count]
        yield cases
        count, number = count - len(cases), number + 1


class Pair:
    """Compares outcome by outcome, and keeps what neither ledger accounts for.

    The port decodes, and is asked for nothing else: which flags are undefined depends on the leaf.
    """

    def __init__(self, first: Oracle, second: Oracle) -> None:
        self.first, self.second = first, second
        self.decoder = FlatSubject()
        self.agreed = self.in_ledger = 0
        self.unexplained: list[str] = []

    def run(self, cases: Sequence[Case]) -> None:
        outcomes = (self.first.run(cases), self.second.run(cases), self.decoder.run(cases))
        for case, ours, theirs, decoded in zip(cases, *outcomes, strict=True):
            theirs.leaf, theirs.length = decoded.leaf, decoded.length
            self._one(case, ours, theirs)

    def _one(self, case: Case, ours: Outcome, theirs: Outcome) -> None:
        assert not ours.crash + theirs.crash, (case.id, case.code.hex(), ours.crash, theirs.crash)
        hung = ours.hang or theirs.hang
        differences = () if hung or agree(theirs, ours) else compare(case, theirs, ours)
        if not hung and not differences:
            self.agreed += 1
            return
        known = [
            field for field, _ in (*self.first.unchecked(case, ours), *self.second.unchecked(case, theirs))
        ]
        if hung:  # a far transfer into a segment of the host
            assert "all" in known, case.id
        left = [d for d in differences if not any(covers(field, d.field) for field in known)]
        if left:
            self.unexplained.append(self._show(case, left[0]))
        else:
            self.in_ledger += 1

    def _show(self, case: Case, difference: Difference) -> str:
        return (
            f"{case.id} {case.mode} {case.code.hex()} {difference.field}: "
            f"{self.second.name} {difference.subject}, {self.first.name} {difference.oracle}"
        )


def assert_agreement(
    first: Oracle, second: Oracle, seed: int, count: int, *, at_most: float, **options: object
) -> None:
    """The oracles agree on `count` cases; their ledgers excuse no more than the share `at_most`."""
    pair = Pair(first, second)
    for cases in cases_for((first, second), seed, count, **options):
        pair.run(cases)
    assert not pair.unexplained, pair.unexplained[:5]
    assert pair.agreed + pair.in_ledger == count, (pair.agreed, pair.in_ledger)
    assert pair.in_ledger < count * at_most, pair.in_ledger
