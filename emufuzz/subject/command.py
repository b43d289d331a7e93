"""Any program that speaks the exchange format over pipes, as the thing under test (docs/command.md)."""

from __future__ import annotations

from collections.abc import Sequence

from emufuzz import __version__
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.case.program import CASE_SECONDS, Program, refused
from emufuzz.subject.flat import FlatSubject


class CommandSubject:
    """An external emulator under test; where it dies or hangs is a finding, and it is started again."""

    def __init__(self, command: str, timeout: float = CASE_SECONDS) -> None:
        """Start the program.

        Raises:
            ProgramError: It does not start, or does not speak the protocol.
        """
        self._program = Program(command, timeout)
        self.name = f"cmd:{self._program.hello.name}"
        self._decoder = FlatSubject(events=False)

    def fingerprint(self) -> dict[str, str]:
        """Name and version that the program gives, its command line, and this package's version."""
        hello = self._program.hello
        return {
            "subject": self.name, "version": hello.version, "command": self._program.command,
            "emufuzz": __version__,
        }  # fmt: skip

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if the program has not offered to take the case."""
        self._program.check(case)

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases in order; those that the program has not offered to take are refused."""
        outcomes = {i: refused(case, why) for i, case in enumerate(batch) if (why := self._why_not(case))}
        taken = [i for i in range(len(batch)) if i not in outcomes]
        outcomes |= zip(taken, self._program.run([batch[i] for i in taken]), strict=True)
        for i in taken:
            self._name_leaf(batch[i], outcomes[i])
        return [outcomes[i] for i in range(len(batch))]

    def _why_not(self, case: Case) -> str:
        try:
            self._program.check(case)
        except UnsupportedCaseError as error:
            return str(error)
        return ""

    def _name_leaf(self, case: Case, outcome: Outcome) -> None:
        """Which opcode it is, by the port's decoder: it decides on undefined flags and sorts findings."""
        try:
            self._decoder.check(case)
        except UnsupportedCaseError:
            return
        [decoded] = self._decoder.run([case])
        outcome.leaf = outcome.leaf or decoded.leaf
        if outcome.length is None and outcome.exception is None:
            outcome.length = decoded.length

    def close(self) -> None:
        """End the program."""
        self._program.close()
