"""`emufuzz exec`: Cases in on stdin, Outcomes out on stdout, one JSON object per line each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, BinaryIO, Final, Protocol

import typer

from emufuzz.case.delta import recorded_events
from emufuzz.case.errors import CaseError, UnsupportedCaseError
from emufuzz.case.fields import MAX_DOCUMENT
from emufuzz.case.json import case_from_json, outcome_to_json
from emufuzz.case.model import Case, Outcome
from emufuzz.cli.errors import EXIT_BAD_INPUT, EXIT_OK, InputError, one_line
from emufuzz.cli.lines import Line, LineReader, RawStream

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


#: Subjects among the engines; all others are oracles.
SUBJECT_ENGINES: Final = ("emulator", "kvm")


class Engine(Protocol):
    """A subject or an oracle, as far as running cases goes."""

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError for a case it cannot take."""

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """One outcome per case, in order."""


@app.command("exec")
def exec_cases(
    engine: Annotated[
        str, typer.Option(help="What runs the cases: emulator, kvm, or an oracle, cmd:PROGRAM among them.")
    ],
    events: Annotated[bool, typer.Option("--events", help="Also list the emulator's callbacks.")] = False,
) -> int:
    """Run cases read from stdin (JSON lines) and write their outcomes to stdout, in the same order.

    A line that is no case, or one this engine cannot take, is answered by {"line":N,"error":"..."} in
    its place; the exit code is then 2. Blank lines are skipped. As in the recorded vectors, events leave
    out the first fetch where it is the only one and nothing was raised. The engine kvm takes cases with a
    path and logs no callbacks.
    """
    if events and engine == "kvm":
        raise InputError(
            "--events", "the engine kvm logs no callbacks; emufuzz repro --trace shows its trace"
        )
    if sys.stdin is None:
        return EXIT_OK
    executor = Executor(open_engine(engine, events=events), events=events)
    return executor.pump(sys.stdin.buffer, sys.stdout.buffer)  # type: ignore[arg-type] # a BufferedReader has read1


def open_engine(name: str, *, events: bool) -> Engine:
    """The engine of that name; OracleUnavailableError if it cannot work here, InputError if there is none."""
    if name == "emulator":
        from emufuzz.subject.flat import FlatSubject

        return FlatSubject(events=events)
    if name == "kvm":
        from emufuzz.subject.kvm import KvmSubject

        return KvmSubject()
    from emufuzz.oracle.registry import UnknownOracleError, open_oracle

    try:
        return open_oracle(name)
    except UnknownOracleError as error:
        known = " or ".join(SUBJECT_ENGINES)
        raise InputError("--engine", f"{error}; or {known}") from error


class Executor:
    """Answers lines with lines; remembers whether any of them was bad."""

    def __init__(self, engine: Engine, *, events: bool) -> None:
        self._engine = engine
        self._events = events
        self._vouch = getattr(engine, "unchecked", None)
        self.bad = False

    def pump(self, source: RawStream, sink: BinaryIO) -> int:
        """Answer everything that arrives, at once; the exit code when the input ends."""
        for lines in LineReader(source, MAX_DOCUMENT).batches():
            sink.write(b"".join([answer + b"\n" for answer in self.answers(lines)]))
            sink.flush()
        return EXIT_BAD_INPUT if self.bad else EXIT_OK

    def answers(self, lines: Sequence[Line]) -> Iterator[bytes]:
        """One JSON text per line that is not blank."""
        read = [(line, self._read(line)) for line in lines if line.data is None or line.data.strip()]
        cases = [case for _, case in read if isinstance(case, Case)]
        outcomes = iter(self._engine.run(cases) if cases else ())
        for line, case in read:
            if isinstance(case, Case):
                yield self._text(case, next(outcomes))
            else:
                self.bad = True
                yield json.dumps({"line": line.number, "error": case}).encode()

    def _read(self, line: Line) -> Case | str:
        """The case in a line, or why there is none."""
        if line.data is None:
            return f"longer than {MAX_DOCUMENT} bytes"
        try:
            case = case_from_json(line.data)
            self._engine.check(case)
        except (CaseError, UnsupportedCaseError) as error:
            return one_line(error)
        return case

    def _text(self, case: Case, outcome: Outcome) -> bytes:
        if self._vouch is not None and not outcome.unchecked:
            outcome.unchecked = self._vouch(case, outcome)
        if self._events:
            outcome.events = recorded_events(outcome)
        return outcome_to_json(case, outcome, events=self._events)
