"""The oracle of exits: paths on which the instruction at RIP is not what happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome, is_physical
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.exits.backdoor import backdoor
from emufuzz.oracle.exits.before import apic_access, breaks, code_breakpoint
from emufuzz.oracle.exits.hypercall import hypercall, is_hypercall
from emufuzz.oracle.exits.msr import msr_completion
from emufuzz.oracle.exits.real import real_event
from emufuzz.oracle.exits.reserved import reserved_entry
from emufuzz.oracle.exits.run import FAULTS, OpenError, Run
from emufuzz.oracle.exits.skip import skipped
from emufuzz.oracle.exits.task import KVM, task_switch
from emufuzz.oracle.native_view import asks_for_msr, kvm_of

if TYPE_CHECKING:
    from emufuzz.oracle.gaps import Gap

#: Path -> what happens on it.
MODELS: Final[dict[str, Callable[[Run], Outcome]]] = {
    "rmode-inject": real_event,
    "task-switch": task_switch,
    "msr-completion": msr_completion,
    "skip": skipped,
    "vmware-gp": backdoor,
    "apic-access": apic_access,
    "ept-violation-maxphyaddr": reserved_entry,
}


#: KVM_GUESTDBG_INJECT_DB and _BP.
_INJECTED: Final = 0xC0000
_ALL: Final = (("all", FAULTS),)
#: Those that read and write memory.
_FLAT: Final = (real_event, task_switch, skipped)


class ExitsOracle:
    """Models of the SDM's for what some exits stand for (emufuzz.oracle.base.Oracle).

    Where a fault occurs on the way the outcome vouches for nothing (gap `exits-fault`).
    """

    name: str = "exits"

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """None: what is left open is said with each answer."""
        return ()

    @property
    def capabilities(self) -> Capabilities:
        """Exit paths alone."""
        return Capabilities(physical=True, devices=True, paths=True)

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if this oracle cannot take the case."""
        model = _model(case)
        if is_physical(case) and model in _FLAT:
            raise UnsupportedCaseError("phys: events and tasks are worked out on flat memory")
        if case.count != 1:
            raise UnsupportedCaseError(f"count: one exit, got {case.count}")
        if _debugger(case) & _INJECTED:
            raise UnsupportedCaseError("kvm.guest_debug: userspace injects an exception")
        if "callbacks" in (case.extra or {}):
            raise UnsupportedCaseError("callbacks: only an emulator has them")
        try:
            model(Run(case))
        except OpenError:
            return

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """What each exit leads to; the outcomes come in the same order."""
        return [_run(case) for case in batch]

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:  # noqa: ARG002 - the outcome has all
        """What this oracle does not vouch for: (field or "all", gap id) pairs."""
        return outcome.unchecked

    def fingerprint(self) -> dict[str, str]:
        """Name of the oracle and number of its models."""
        return {"oracle": self.name, "models": str(len(MODELS))}

    def close(self) -> None:
        """Nothing is held."""


def _debugger(case: Case) -> int:
    debug = kvm_of(case).get("guest_debug") or 0
    return int(debug["control"] if isinstance(debug, Mapping) else debug)


def _model(case: Case) -> Callable[[Run], Outcome]:
    """What happens in a case.

    Raises:
        UnsupportedCaseError: It is the instruction at RIP.
    """
    if breaks(case):
        return code_breakpoint
    if case.path in MODELS:
        return MODELS[case.path]
    if is_hypercall(case):
        return hypercall
    if case.path is not None and asks_for_msr(case):
        return msr_completion
    raise UnsupportedCaseError("path: the instruction at RIP tells how the case ends")


def _run(case: Case) -> Outcome:
    run = Run(case)
    try:
        return _model(case)(run)
    except OpenError:
        outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system)
        outcome.unchecked = _left_open(case)
        return outcome


def _left_open(case: Case) -> tuple[tuple[str, str], ...]:
    """What is not vouched for where something happens on the way that the models leave open.

    That is all, but for a task switch that KVM completes, where the processor does not: a subject that does
    the same has a quirk (kvm-task-state), and another one is wrong in any case.
    """
    if _model(case) is not task_switch:
        return _ALL
    try:
        return task_switch(Run(case), KVM).unchecked
    except (OpenError, UnsupportedCaseError):  # KVM does not get to the end either
        return _ALL
