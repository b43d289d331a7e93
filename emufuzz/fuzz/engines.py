"""Which subject and oracle a campaign runs; importable by name in worker processes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Final

from emufuzz.case.program import ProgramError
from emufuzz.fuzz.finding_json import versions
from emufuzz.oracle.base import Oracle, OracleUnavailableError
from emufuzz.oracle.registry import open_oracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.base import Subject, close_subject
from emufuzz.subject.command import CommandSubject
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject


def make_subject() -> Subject:
    """The port alone on flat memory, without a log of callbacks, which no oracle has."""
    return FlatSubject(events=False)


def make_kvm_subject() -> Subject:
    """The port inside the model of KVM, entered through the cases' exit paths."""
    return KvmSubject()


#: `--subject` -> how a worker makes it.
SUBJECTS: Final = {"emulator": make_subject, "kvm": make_kvm_subject}


#: What begins the name of a subject that is a program (docs/command.md).
PROGRAM: Final = "cmd:"


def make_program(command: str) -> Subject:
    """A program as the thing under test.

    Raises:
        OracleUnavailableError: It does not start, or does not speak the protocol.
    """
    try:
        return CommandSubject(command)
    except ProgramError as error:
        raise OracleUnavailableError(f"subject: {error}") from error


def is_subject(name: str) -> bool:
    """Whether `--subject` may name it: one of SUBJECTS, or `cmd:` and a command line."""
    return name in SUBJECTS or (name.startswith(PROGRAM) and bool(name.removeprefix(PROGRAM).strip()))


def subject_maker(name: str) -> Callable[[], Subject]:
    """How a worker makes the subject of that name."""
    if name.startswith(PROGRAM):
        return functools.partial(make_program, name.removeprefix(PROGRAM))
    return SUBJECTS[name]


def make_oracle() -> Oracle:
    """Unicorn.

    Raises:
        OracleUnavailableError: It cannot work here.
    """
    return UnicornOracle()


def campaign_versions(subject: str = "emulator", others: Sequence[str] = ()) -> dict[str, str]:
    """The versions that findings with a subject are recorded with.

    Args:
        subject: One of SUBJECTS, or `cmd:` and a command line.
        others: Names of oracles beside the first one; each adds its name with what it is.

    Raises:
        OracleUnavailableError: An oracle, or a program as subject, cannot work here.
    """
    tested, oracle = subject_maker(subject)(), make_oracle()
    try:
        found = versions((tested.fingerprint(), oracle.fingerprint()))
    finally:
        oracle.close()
        close_subject(tested)
    if others:
        found["oracles"] = ",".join((found["oracle"], *others))
    for name in others:
        other = open_oracle(name)
        what = [value for key, value in other.fingerprint().items() if key != "oracle"]
        found[name] = " ".join(what)
        other.close()
    return found
