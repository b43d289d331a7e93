"""Where KVM's emulator knowingly departs from the hardware: named rules that recognise each.

The port keeps these on purpose. A rule names its leaves and checks the whole set of differences
against what exactly KVM does, so that another fault in the same instruction is still a finding.
A case that a rule explains is counted under the rule's id.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.device_trace import DEVICE_TRACE
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.quirk_scope import rest_is_kept
from emufuzz.oracle.quirks.checks import CHECK_QUIRKS
from emufuzz.oracle.quirks.events import EVENT_QUIRKS
from emufuzz.oracle.quirks.exits import EXIT_QUIRKS
from emufuzz.oracle.quirks.machine import MACHINE_QUIRKS
from emufuzz.oracle.quirks.plain import QUIRKS
from emufuzz.oracle.quirks.quirk import Quirk

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

__all__ = (
    "ALL_QUIRKS",
    "CHECK_QUIRKS",
    "EVENT_QUIRKS",
    "EXIT_QUIRKS",
    "MACHINE_QUIRKS",
    "QUIRKS",
    "Quirk",
    "explaining_quirk",
)

#: All of them, in the order in which they are asked.
ALL_QUIRKS: Final = (*QUIRKS, *CHECK_QUIRKS, *EVENT_QUIRKS, *MACHINE_QUIRKS, *EXIT_QUIRKS)
_PLAIN: Final = (*QUIRKS, *CHECK_QUIRKS, *EVENT_QUIRKS)


def explaining_quirk(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> str | None:
    """The id of the first quirk that explains all differences, or None.

    The rules get the case as hardware executes it natively. Accesses that a log of callbacks or
    the devices of an exit path show may have a quirk of their own beside that of the rest. A single-step trap
    is of the end of an instruction: what explains how that ends explains it with the trap, too.
    """
    found = _one_quirk(case, subject, oracle, differences)
    both = subject.exception is not None and oracle.exception is not None
    if not found and both and (is_trapped(subject) or is_trapped(oracle)):
        found = _one_quirk(case, _untrapped(subject), _untrapped(oracle), differences)
    accesses = [difference for difference in differences if difference.field == DEVICE_TRACE]
    logged = subject.events or case.path is not None
    if found or not logged or not accesses or len(accesses) == len(differences):
        return found
    rest = [difference for difference in differences if difference.field != DEVICE_TRACE]
    parts = [_one_quirk(case, subject, oracle, part) for part in (rest, accesses)]
    return None if None in parts else "+".join(filter(None, parts))


def is_trapped(outcome: Outcome) -> bool:
    """The instruction is done, and a single-step trap follows."""
    return outcome.rc == "continue" and outcome.exception == (DB_VECTOR, None, None)


def _untrapped(outcome: Outcome) -> Outcome:
    return msgspec.structs.replace(outcome, exception=None) if is_trapped(outcome) else outcome


def _one_quirk(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> str | None:
    plain = case.path is None and case.extra is None and subject.extra is None
    view = judge_case(case)
    for quirk in _PLAIN if plain else ALL_QUIRKS:
        here = quirk.leaves is None or subject.leaf in quirk.leaves
        if here and (not quirk.paths or case.path in quirk.paths):
            explained = quirk.explains is not None and quirk.explains(
                case if quirk.of_exit else view, subject, oracle, differences
            )
            if explained and (not plain or rest_is_kept(quirk.id, case, subject, oracle, differences)):
                return quirk.id
    return None
