"""Running one case again, through the emulator and Unicorn, and judging what comes out."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import FINDING, SKIPPED, Difference, Verdict, judge
from emufuzz.oracle.quirks import QUIRKS
from emufuzz.subject.flat import FlatSubject

#: Seconds after which the emulator counts as hanging; a case takes microseconds.
HANG_SECONDS: Final = 5.0


class Replay(NamedTuple):
    """A case, what the emulator made of it, what the oracle says (None if it crashed), and the verdict."""

    case: Case
    subject: Outcome
    oracle: Outcome | None
    verdict: Verdict
    unchecked: tuple[tuple[str, str], ...] = ()


class _HangError(BaseException):
    """Ends a run that takes too long; no BaseException is mistaken for a crash of the emulator."""


class Replayer:
    """The engines, opened when they are first needed."""

    def __init__(self) -> None:
        self._subject = FlatSubject(events=True)
        self._oracle: Oracle | None = None

    @property
    def subject_name(self) -> str:
        """What the emulator is called in reports."""
        return self._subject.name

    def oracle(self) -> Oracle:
        """Unicorn; OracleUnavailableError if it cannot work here."""
        if self._oracle is None:
            from emufuzz.oracle.unicorn import UnicornOracle  # noqa: PLC0415 - vectors can do without it

            self._oracle = UnicornOracle()
        return self._oracle

    def run_subject(self, case: Case) -> Outcome:
        """What the emulator makes of a case; UnsupportedCaseError if it cannot take it."""
        self._subject.check(case)
        try:
            with _time_limit():
                [outcome] = self._subject.run([case])
        except _HangError:
            self._subject = FlatSubject(events=True)
            return Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, hang=True)
        return outcome

    def replay(self, case: Case) -> Replay:
        """Run a case through both sides and judge them.

        Raises:
            UnsupportedCaseError: One of them cannot take the case.
            OracleUnavailableError: Unicorn cannot work here.
        """
        oracle = self.oracle()
        subject = self.run_subject(case)
        oracle.check(case)
        try:
            [answer] = oracle.run([case])
        except Exception:  # noqa: BLE001 - a crash of the oracle is a result, as in campaigns
            text = traceback.format_exc(limit=-6).strip()
            crash = Difference(oracle.name, "crash", "", text)
            return Replay(case, subject, None, Verdict(FINDING, "", (crash,)))
        verdict = judge(case, subject, answer, oracle)
        return Replay(case, subject, answer, verdict, oracle.unchecked(case, answer))


@contextmanager
def _time_limit() -> Iterator[None]:
    def expired(_signal: int, _frame: Any) -> None:
        raise _HangError

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def difference_keys(differences: tuple[Difference, ...]) -> frozenset[tuple[Any, ...]]:
    """What makes two disagreements the same; of a crash only what was raised, not where."""
    return frozenset(_key(difference) for difference in differences)


def _key(difference: Difference) -> tuple[Any, ...]:
    if difference.kind in ("crash", "hang"):
        return difference.field, difference.kind, _raised(difference.subject), _raised(difference.oracle)
    return tuple(difference)


def _raised(text: str) -> str:
    """The exception of a crash's text, which is its first line, or the last one of a traceback."""
    lines = text.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def reason_text(reason: str) -> str:
    """What the id of a gap or quirk stands for; several ids are joined by `+`."""
    known = {quirk.id: f"{quirk.kvm} ({quirk.reference})" for quirk in QUIRKS}
    if reason.startswith("subject-"):
        return reason
    from emufuzz.oracle.unicorn.ledger import REASONS  # noqa: PLC0415 - only with differences to explain

    known |= REASONS
    return "; ".join(f"{part}: {known[part]}" if part in known else part for part in reason.split("+"))


def explained(verdict: Verdict) -> bool:
    """Whether there are differences, all of them under the name of a quirk or gap."""
    return verdict.kind == SKIPPED and bool(verdict.differences)
