"""Which subject and oracle a campaign runs; importable by name in worker processes."""

from __future__ import annotations

from emufuzz.fuzz.store import versions
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.base import Subject
from emufuzz.subject.flat import FlatSubject


def make_subject() -> Subject:
    """The port alone on flat memory, without a log of callbacks, which no oracle has."""
    return FlatSubject(events=False)


def make_oracle() -> Oracle:
    """Unicorn.

    Raises:
        OracleUnavailableError: It cannot work here.
    """
    return UnicornOracle()


def campaign_versions() -> dict[str, str]:
    """The versions that findings are recorded with.

    Raises:
        OracleUnavailableError: The oracle cannot work here.
    """
    oracle = make_oracle()
    try:
        return versions((make_subject().fingerprint(), oracle.fingerprint()))
    finally:
        oracle.close()
