"""Running one case again, through its subject and Unicorn, and judging what comes out."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.panel import Panel
from emufuzz.kvm.trace import format_trace
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import FINDING, SKIPPED, Difference, Verdict, judge
from emufuzz.oracle.quirks import ALL_QUIRKS
from emufuzz.oracle.registry import open_oracle
from emufuzz.oracle.verdict import Opinion, Ruling
from emufuzz.subject.base import Subject
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

#: Seconds of processor time after which the emulator counts as hanging; a case takes microseconds.
HANG_SECONDS: Final = 5.0


class Replay(NamedTuple):
    """A case, what the subject made of it, what the oracle says, and the verdict.

    `oracle` is None if it crashed, or if it cannot take the case; `refused` then says why not. With
    further oracles `ruling` is what all say together, and `others` has their opinions.
    """

    case: Case
    subject: Outcome
    oracle: Outcome | None
    verdict: Verdict
    unchecked: tuple[tuple[str, str], ...] = ()
    refused: str = ""
    ruling: Ruling | None = None
    others: tuple[Opinion, ...] = ()


class _HangError(BaseException):
    """Ends a run that takes too long; no BaseException is mistaken for a crash of the emulator."""


class Replayer:
    """The engines, opened when they are first needed.

    A case with a path goes through the KVM model, any other one through the emulator alone; all go through
    `program` if there is one.
    """

    def __init__(self, program: Subject | None = None) -> None:
        self.program = program
        self._emulator = FlatSubject(events=True)
        self._kvm = KvmSubject(trace=True)
        self._oracle: Oracle | None = None
        self._panels: dict[tuple[str, ...], Panel] = {}

    def subject_name(self, case: Case) -> str:
        """What the subject of a case is called in reports."""
        return self._subject(case).name

    def oracle(self) -> Oracle:
        """Unicorn; OracleUnavailableError if it cannot work here."""
        if self._oracle is None:
            from emufuzz.oracle.unicorn import UnicornOracle  # noqa: PLC0415 - vectors can do without it

            self._oracle = UnicornOracle()
        return self._oracle

    def trace(self, case: Case) -> list[str] | None:
        """KVM's tracepoints of the last run of a case with a path; None for others, which have none."""
        if case.path is None or self._kvm.trace is None:
            return None
        return format_trace(self._kvm.trace.events)

    def run_subject(self, case: Case) -> Outcome:
        """What the subject makes of a case; UnsupportedCaseError if it cannot take it."""
        subject = self._subject(case)
        subject.check(case)
        try:
            with _time_limit():
                [outcome] = subject.run([case])
        except _HangError:
            self._emulator, self._kvm = FlatSubject(events=True), KvmSubject(trace=True)
            return Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, hang=True)
        return outcome

    def replay(self, case: Case, others: tuple[str, ...] = ()) -> Replay:
        """Run a case through both sides, and through `others` that take it, and judge them.

        Raises:
            UnsupportedCaseError: The subject cannot take the case, or the oracle one without a path.
            OracleUnavailableError: Unicorn, or one of the others, cannot work here.
        """
        replay = self._replay(case)
        if not others:
            return replay
        ruling, opinions = self._panel(others).judge(case, replay.subject, replay.oracle)
        mine = replay.oracle is not None
        return replay._replace(ruling=ruling, others=tuple(opinions[1:] if mine else opinions))

    def _panel(self, others: tuple[str, ...]) -> Panel:
        if others not in self._panels:
            self._panels[others] = Panel(self.oracle(), [open_oracle(name) for name in others])
        return self._panels[others]

    def _replay(self, case: Case) -> Replay:
        oracle = self.oracle()
        subject = self.run_subject(case)
        try:
            oracle.check(case)
        except UnsupportedCaseError as error:
            if case.path is None:
                raise
            verdict = Verdict(SKIPPED, f"{oracle.name} cannot judge it: {error}", ())
            return Replay(case, subject, None, verdict, refused=str(error))
        return _judged(case, subject, oracle)

    def _subject(self, case: Case) -> Subject:
        if self.program is not None:
            return self.program
        return self._emulator if case.path is None else self._kvm


def _judged(case: Case, subject: Outcome, oracle: Oracle) -> Replay:
    """Let the oracle run a case that it can take."""
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

    before = signal.signal(signal.SIGPROF, expired)
    signal.setitimer(signal.ITIMER_PROF, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


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
    known = {quirk.id: f"{quirk.kvm} ({quirk.reference})" for quirk in ALL_QUIRKS}
    if reason.startswith("subject-"):
        return reason
    from emufuzz.oracle.registry import gap_reasons  # noqa: PLC0415 - only with differences to explain

    known |= gap_reasons()
    return "; ".join(f"{part}: {known[part]}" if part in known else part for part in reason.split("+"))


def explained(verdict: Verdict) -> bool:
    """Whether there are differences, all of them under the name of a quirk or gap."""
    return verdict.kind == SKIPPED and bool(verdict.differences)
