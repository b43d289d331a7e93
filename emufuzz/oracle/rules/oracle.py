"""The rules as an oracle: exceptions that must come, and a review of anybody's outcome."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from emufuzz.arch.exceptions import DB_VECTOR, PF_VECTOR
from emufuzz.case.model import Case, Fault, Outcome
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.gaps import Gap
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.rules.review import check_case, determined, first_due, review
from emufuzz.oracle.rules.rule import Violation
from emufuzz.oracle.rules.table import RULES

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: Why the rules do not vouch for a field.
UNDETERMINED: Final = "rules-undetermined"
#: The only gap: id -> reason.
ATTACHED: Final = {UNDETERMINED: "no rule demands an exception, or several may come: rules say no more"}
_ALL: Final = (("all", UNDETERMINED),)
#: What a fault may leave different all the same: accessed bits, what several writes did, CR2, DR6.
_LEFT_OPEN: Final = (("mem", UNDETERMINED), ("rflags", UNDETERMINED), ("device_trace", UNDETERMINED))
_GPRS: Final = frozenset(
    ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{number}" for number in range(8, 16)))
)
_FAULT_KINDS: Final = {
    "exception.error_code": "fault-error-code",
    "exception.address": "fault-address",
    "mem": "memory",
    "rip": "rip",
    "rflags": "rflags",
    "device_trace": "device-trace",
}


class RulesOracle:
    """What the SDM demands of a case, whatever any other engine says (emufuzz.oracle.base.Oracle)."""

    name: str = "rules"

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """None: what the rules do not determine is said with each answer."""
        return ()

    @property
    def capabilities(self) -> Capabilities:
        """Everything but several instructions in a row."""
        return Capabilities(physical=True, devices=True, paths=True)

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if no rule is about such a case."""
        check_case(case)

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """For each case the exception that must come, or an outcome that vouches for nothing."""
        return [self._run(case) for case in batch]

    def demanded(self, case: Case, subject: Outcome) -> Outcome:
        """`run` of one case; where several exceptions may come, with the first one that the rules name.

        A repeated instruction is looked at where the subject stopped.
        """
        outcome = self._run(case)
        if outcome.exception is None:
            fault = first_due(case, subject)
            if fault is not None:
                outcome.rc, outcome.exception = "propagate_fault", fault
        return outcome

    @staticmethod
    def _run(case: Case) -> Outcome:
        view = case if case.path is None and case.extra is None else judge_case(case)
        fault = determined(case)
        outcome = Outcome(case.id, view.gpr, view.rip, view.rflags, view.system, unchecked=_ALL)
        if fault is not None:
            outcome.rc, outcome.exception = "propagate_fault", fault
            outcome.unchecked = _left_open(fault)
        return outcome

    def review(self, case: Case, outcome: Outcome) -> tuple[Violation, ...]:
        """Every rule that an outcome breaks."""
        return review(case, outcome)

    def differences(self, case: Case, outcome: Outcome) -> tuple[Difference, ...]:
        """The violations as differences between a subject and this oracle, for quirks and verdicts."""
        return tuple(as_difference(violation, outcome) for violation in review(case, outcome))

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 - the outcome has all
        """What an outcome of `run` does not vouch for: (field or "all", reason) pairs."""
        return outcome.unchecked

    def fingerprint(self) -> dict[str, str]:
        """Name and number of the rules."""
        return {"oracle": self.name, "rules": str(len(RULES))}

    def close(self) -> None:
        """Nothing is held."""


def _left_open(fault: Fault) -> tuple[tuple[str, str], ...]:
    special = {PF_VECTOR: "cr2", DB_VECTOR: "dr6"}.get(fault[0])
    return _LEFT_OPEN if special is None else (*_LEFT_OPEN, (special, UNDETERMINED))


def as_difference(violation: Violation, outcome: Outcome) -> Difference:
    """A violation in the words of comparisons; the kind follows from its field and the outcome."""
    from emufuzz.oracle.compare import Difference  # noqa: PLC0415 - compare imports the oracles' base

    kind = _FAULT_KINDS.get(violation.field, "gpr" if violation.field in _GPRS else "system")
    if violation.field == "exception":
        kind = _exception_kind(violation, outcome)
    return Difference(violation.field, kind, violation.found, violation.demand)


def _exception_kind(violation: Violation, outcome: Outcome) -> str:
    if outcome.exception is None:
        return "fault-missing"
    return "fault-extra" if violation.rule.endswith(("-cause", "-place")) else "fault-vector"
