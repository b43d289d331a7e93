"""Comparison with recorded outcomes, to the last bit: nothing is masked, order of callbacks included.

The recorded vectors say what KVM's emulator did, so undefined flags and callbacks count as much as
defined results. How oracles are compared, which vouch for less, is emufuzz.oracle.compare.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emufuzz.case.delta import recorded_events
from emufuzz.case.model import Case, Outcome, memory_changes

#: Fields of an outcome that are compared as they are.
PLAIN_FIELDS: Final = (
    "crash",
    "hang",
    "decode_rc",
    "rc",
    "exception",
    "rip",
    "rflags",
    "interruptibility",
    "restarts",
)
SYSTEM_FIELDS: Final = (
    "seg", "gdtr", "idtr", "cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0", "dr", "msr", "fpu",
)  # fmt: skip


def recorded_differences(case: Case, outcome: Outcome, expected: Outcome) -> list[str]:
    """Names of the fields in which an outcome is not what was recorded; empty if it is the same."""
    names = [name for name in PLAIN_FIELDS if getattr(outcome, name) != getattr(expected, name)]
    names += [name for name, differs in _DERIVED.items() if differs(case, outcome, expected)]
    if outcome.system is not expected.system and outcome.system != expected.system:
        names += [
            name for name in SYSTEM_FIELDS if getattr(outcome.system, name) != getattr(expected.system, name)
        ]
    return names


def _length(case: Case, outcome: Outcome, expected: Outcome) -> bool:  # noqa: ARG001 - one signature for all
    return expected.decode_rc == "ok" and outcome.length != expected.length


def _gpr(case: Case, outcome: Outcome, expected: Outcome) -> bool:  # noqa: ARG001 - one signature for all
    return tuple(outcome.gpr) != tuple(expected.gpr)


def _mem(case: Case, outcome: Outcome, expected: Outcome) -> bool:
    """A page that was written with what it held counts as unchanged."""
    if outcome.pages == expected.pages:
        return False
    return memory_changes(case, outcome) != memory_changes(case, expected)


def _events(case: Case, outcome: Outcome, expected: Outcome) -> bool:  # noqa: ARG001 - one signature for all
    return recorded_events(outcome) != recorded_events(expected)


_DERIVED: Final[dict[str, Callable[[Case, Outcome, Outcome], bool]]] = {
    "length": _length,
    "gpr": _gpr,
    "mem": _mem,
    "events": _events,
}
