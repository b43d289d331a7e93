"""KvmSubject: each case enters KVM through its path and is handled to the end, userspace included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from emufuzz import __version__
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome, is_physical
from emufuzz.emulator.x86emul import X86EMUL_IO_NEEDED
from emufuzz.kvm.cpuid import CpuidError
from emufuzz.kvm.exit_system import KvmBugError
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.memslots import MemslotError
from emufuzz.kvm.mmu.hidden import NoAddressError
from emufuzz.kvm.options import OptionsError, options_from_knobs
from emufuzz.kvm.run import USERSPACE, after_exit
from emufuzz.kvm.trace import Trace
from emufuzz.subject.crash import crashed
from emufuzz.subject.kvm.build import build_machine, kvm_of
from emufuzz.subject.kvm.instruction_exits import NoExitError
from emufuzz.subject.kvm.outcome import outcome_of
from emufuzz.subject.kvm.paths import PATH_SPECS, PathSpec
from emufuzz.subject.kvm.userspace import Userspace

_PG: Final = 1 << 31


class KvmSubject:
    """The port of emulate.c inside the model of KVM."""

    name: str = "kvm"

    def __init__(self, *, trace: bool = False) -> None:
        """With `trace` the tracepoints of the last case are in `self.trace`."""
        self._tracing = trace
        self.trace: Trace | None = None

    def fingerprint(self) -> dict[str, str]:
        """Name and version of what ran."""
        return {"subject": self.name, "emufuzz": __version__}

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError for cases that have no path or contradict themselves."""
        spec = _spec(case)
        if "callbacks" in (case.extra or {}):
            raise UnsupportedCaseError("callbacks: KVM has its own")
        try:
            options = options_from_knobs({**spec.knobs, **kvm_of(case).get("knobs", {})})
            build_machine(case, spec.knobs)
        except OptionsError as error:
            text = str(error)
            raise UnsupportedCaseError(text if text.startswith("kvm.") else f"kvm.knobs: {text}") from error
        except CpuidError as error:
            raise UnsupportedCaseError(str(error)) from error
        except MemslotError as error:
            raise UnsupportedCaseError(f"kvm.memslots: {error}") from error
        if not options.ept and case.system.cr0 & _PG and not is_physical(case):
            raise UnsupportedCaseError("mem: shadow paging needs the guest's own tables, as phys has them")

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases in order; a Python exception becomes the outcome's `crash`."""
        outcomes = []
        for case in batch:
            try:
                outcomes.append(self._run(case))
            except Exception as error:  # noqa: BLE001 - any crash of the thing under test is a result
                outcomes.append(crashed(case, error))
        return outcomes

    def _run(self, case: Case) -> Outcome:
        spec = _spec(case)
        machine, devices = build_machine(case, spec.knobs)
        if self._tracing:
            self.trace = machine.vcpu.trace = Trace()
        userspace = Userspace(machine, devices, dict(case.system.msr))
        try:
            ended = after_exit(machine, spec.enter(machine, kvm_of(case)))
        except (NoExitError, KvmBugError, NoAddressError) as error:
            return _no_exit(case, machine, str(error))
        if ended == USERSPACE:
            try:
                ended = userspace.complete()
            except NoAddressError as error:
                return _no_exit(case, machine, str(error))
        outcome = outcome_of(case, machine, devices, userspace.exits)
        if ended != USERSPACE and _is_stuck(case, machine, outcome):
            outcome.extra = {**(outcome.extra or {}), "livelock": True}
        return outcome


def _spec(case: Case) -> PathSpec:
    if case.path is None:
        raise UnsupportedCaseError("path: the KVM model needs to know how it is entered")
    return PATH_SPECS[case.path]


def _no_exit(case: Case, machine: KvmMachine, why: str) -> Outcome:
    """Hardware would not have raised the exit: nothing was tested."""
    return Outcome(
        case.id,
        case.gpr,
        case.rip,
        case.rflags,
        case.system,
        rc="unhandleable",
        decode_rc="failed",
        reason=f"no exit: {why}",
        extra={"no_exit": why},
        leaf=machine.ctxt.opcode.leaf if machine.ctxt.opcode is not None else "",
    )


def _is_stuck(case: Case, machine: KvmMachine, outcome: Outcome) -> bool:
    """The guest is resumed at the same instruction with nothing done: it will exit the same way for ever.

    KVM deviation: system structures in a device's memory are never asked of userspace (SDM Vol. 3A
    3.5.1), so that LGDT, FXSAVE and others end without result.
    """
    ctxt = machine.ctxt
    if not machine.emulations or ctxt.rc != X86EMUL_IO_NEEDED or ctxt.eip == ctxt.next_eip:
        return False
    return outcome.exception is None and not machine.mmio.needed and outcome.gpr == case.gpr
