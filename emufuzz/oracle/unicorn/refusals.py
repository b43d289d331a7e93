"""Cases that Unicorn must not see, and gaps that only a run shows."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.case.model import Case, Fault, Outcome
from emufuzz.oracle.unicorn.hidden import debug_move_is_safe
from emufuzz.oracle.unicorn.prefixes import (
    GAP_ABORT,
    GAP_DEBUG_REGISTER,
    aborts_ahead,
    unicorn_must_not_run,
)

#: Unicorn gave up for a reason that is not an exception of the guest.
GAP_ENGINE_ERROR: Final = "unicorn-engine-error"
#: Code that runs over the end of the address space: Unicorn may never come back.
GAP_WRAP: Final = "unicorn-code-wrap"
#: A software interrupt, which ends the run.
GAP_DELIVERY: Final = "unicorn-int-delivery"


def not_run(case: Case, gap: str, fault: Fault | None) -> Outcome:
    """The outcome of a case that Unicorn must not see: nothing changes but for a known exception."""
    return Outcome(
        case.id,
        case.gpr,
        case.rip,
        case.rflags,
        case.system,
        rc="propagate_fault" if fault else "continue",
        exception=fault,
        unchecked=(("all", gap),),
    )


def refused(case: Case) -> Outcome | None:
    """The outcome of a case whose instruction would end the process or set a breakpoint; None for others."""
    gap = unicorn_must_not_run(case.code, case.mode)
    if not gap or (gap == GAP_DEBUG_REGISTER and debug_move_is_safe(case)):
        return not_run(case, GAP_ABORT, None) if aborts_ahead(case.code) else None
    return not_run(case, gap, (UD_VECTOR, None, None) if gap == GAP_ABORT else None)
