"""Recorded outcomes as an oracle: what KVM's own emulator did with exactly this case."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import msgspec

from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.errors import CaseError, UnsupportedCaseError
from emufuzz.case.json import case_to_json
from emufuzz.case.model import Case, Outcome
from emufuzz.case.vectors import read_vectors
from emufuzz.oracle.base import Capabilities, OracleUnavailableError
from emufuzz.oracle.gaps import Gap


def _key(case: Case) -> bytes:
    """A case without its name; equal machine states have equal keys."""
    return blake2b(case_to_json(msgspec.structs.replace(case, id="")), digest_size=16).digest()


class VectorsOracle:
    """Answers the cases that were recorded, and no others.

    Args:
        files: Vector files, plain or compressed (`emufuzz.case.vectors`).

    Raises:
        OracleUnavailableError: A file cannot be read, or a line of it is no vector.
    """

    name: str = "vectors"

    def __init__(self, files: Iterable[Path]) -> None:
        self._files = tuple(files)
        self._recorded: dict[bytes, dict[str, Any]] = {}
        try:
            for path in self._files:
                for case, expect in read_vectors(path):
                    self._recorded.setdefault(_key(case), expect)
        except (CaseError, OSError) as error:
            raise OracleUnavailableError(str(error)) from error

    def __len__(self) -> int:
        """How many different cases are recorded."""
        return len(self._recorded)

    @property
    def capabilities(self) -> Capabilities:
        """Any case may have been recorded."""
        return Capabilities(physical=True, devices=True, count=True)

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """None: what is not vouched for is said with each answer."""
        return ()

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError for a case that was not recorded."""
        if case.path is not None or _key(case) not in self._recorded:
            raise UnsupportedCaseError("vectors: this case was not recorded")

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """The recorded outcomes; one that was not recorded vouches for nothing."""
        return [self._answer(case) for case in batch]

    def _answer(self, case: Case) -> Outcome:
        expect = self._recorded.get(_key(case))
        if expect is not None:
            return expect_to_outcome(case, expect)
        outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system)
        outcome.unchecked = (("all", "vectors-not-recorded"),)
        return outcome

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 - nothing depends on the case
        """Everything that was recorded counts."""
        return outcome.unchecked

    def fingerprint(self) -> dict[str, str]:
        """The files by name, and how many cases they hold."""
        names = ", ".join(path.name for path in self._files)
        return {"oracle": self.name, "files": names, "cases": str(len(self._recorded))}

    def close(self) -> None:
        """Forget the recordings."""
        self._recorded.clear()
