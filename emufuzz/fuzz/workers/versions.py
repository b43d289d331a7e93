"""What a worker runs, so that machines that would find different things do not work together."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from pathlib import Path

import emufuzz
from emufuzz.fuzz.finding_json import versions
from emufuzz.fuzz.tasks import Setup
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.registry import open_oracle
from emufuzz.subject.base import Subject, close_subject


def running(subject: Subject, oracle: Oracle, others: Sequence[Oracle] = ()) -> dict[str, str]:
    """This package, Python, and what subject and oracles say of themselves."""
    found = versions((subject.fingerprint(), oracle.fingerprint()))
    for other in others:
        what = [value for key, value in other.fingerprint().items() if key != "oracle"]
        found[other.name] = " ".join(what)
    return found


def running_here(setup: Setup) -> dict[str, str]:
    """What this process runs with a setup, and the sources it has it from.

    Raises:
        OracleUnavailableError: An oracle cannot work here.
    """
    opened: list[Oracle] = []
    try:
        opened.append(setup.make_oracle())
        opened.extend(open_oracle(name) for name in setup.others)
        subject = setup.make_subject()
        try:
            return running(subject, opened[0], opened[1:]) | sources()
        finally:
            close_subject(subject)
    finally:
        for oracle in opened:
            oracle.close()


@functools.cache
def sources() -> dict[str, str]:
    """Twelve hexadecimal digits for the sources of this package; its version only names the release."""
    root = Path(emufuzz.__file__).parent
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode())
        found.update(hashlib.sha256(path.read_bytes()).digest())
    return {"sources": found.hexdigest()[:12]}


def difference(there: dict[str, str], here: dict[str, str]) -> str:
    """The first thing that is not the same, naming both; empty if all is."""
    for name in here | there:
        one, other = there.get(name, "none"), here.get(name, "none")
        if one != other:
            return f"{name} {one} there, {name} {other} here"
    return ""
