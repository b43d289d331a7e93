"""Any program that speaks the exchange format over pipes, as an oracle (docs/command.md)."""

from __future__ import annotations

from collections.abc import Sequence

from emufuzz.case.model import Case, Outcome
from emufuzz.case.program import CASE_SECONDS, Program, ProgramError
from emufuzz.oracle.base import Capabilities, OracleUnavailableError
from emufuzz.oracle.gaps import Gap
from emufuzz.oracle.native_view import check_judged, judge_case


class CommandOracle:
    """An external program as a judge. It vouches for everything that its answers do not list as unchecked.

    It is given each case as hardware would execute it natively: exit paths and KVM's state apart.
    """

    def __init__(self, command: str, timeout: float = CASE_SECONDS) -> None:
        """Start the program.

        Raises:
            OracleUnavailableError: It does not start, or does not speak the protocol.
        """
        try:
            self._program = Program(command, timeout)
        except ProgramError as error:
            raise OracleUnavailableError(str(error)) from error
        self.name = f"cmd:{self._program.hello.name}"

    @property
    def capabilities(self) -> Capabilities:
        """What the program says that it can take."""
        hello = self._program.hello
        return Capabilities(
            modes=hello.modes, physical=hello.physical, devices=hello.devices, count=hello.count, paths=True
        )

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """None: what is not vouched for is said with each answer."""
        return ()

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if the program has not offered to take the case."""
        check_judged(case)
        self._program.check(judge_case(case))

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; one that kills or hangs the program has an outcome that says so."""
        return self._program.run([judge_case(case) for case in batch])

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 - the program says so itself
        """What the program's answer says it does not vouch for."""
        return outcome.unchecked

    def fingerprint(self) -> dict[str, str]:
        """Name and version that the program gives, and its command line."""
        hello = self._program.hello
        return {"oracle": self.name, "version": hello.version, "command": self._program.command}

    def close(self) -> None:
        """End the program."""
        self._program.close()
