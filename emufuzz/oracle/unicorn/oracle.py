"""The Unicorn oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.devices import devices_of
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_SHIFT, Case, Outcome, case_memory, is_physical
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.gaps import Gap, find_gaps
from emufuzz.oracle.local_apic import APIC_PATH, settle_apic
from emufuzz.oracle.native_view import check_judged, forced_prefix, judge_case, kvm_of, without_harness
from emufuzz.oracle.unicorn.debugging import check_debugging, with_trap, without_trap
from emufuzz.oracle.unicorn.engine import UNICORN_VERSION
from emufuzz.oracle.unicorn.ledger import LEDGER, PLAIN_LEDGER
from emufuzz.oracle.unicorn.memory import MAX_PAGES
from emufuzz.oracle.unicorn.native import NativeRunner, uses_ports
from emufuzz.oracle.unicorn.runner import UnicornRunner
from emufuzz.oracle.unicorn.selftest import self_test
from emufuzz.oracle.unicorn.several import RunStep, run_several, unchecked_steps
from emufuzz.oracle.unicorn.short_movbe import run_as_move

#: DR7: breakpoints that are enabled, and general detection.
_ENABLED: Final = 0xFF | 1 << 13
_APIC_GAP: Final = "unicorn-local-apic"
#: Width of Unicorn's physical addresses.
_PHYSICAL_BITS: Final = 40


class UnicornOracle(UnicornRunner):
    """Unicorn 2.1.4 as an oracle (emufuzz.oracle.base.Oracle)."""

    name = "unicorn"

    def __init__(self) -> None:
        """Open the engine, find the layout of its state, and look for the known traps.

        Raises:
            OracleUnavailableError: Unicorn is not the known version, or a probe or self-test fails.
        """
        super().__init__()
        self._native: NativeRunner | None = None  # opened for the first case that needs it
        self_test(self)

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if this oracle cannot take the case."""
        check_judged(case)
        if case.path is not None and (case.rflags & X86_EFLAGS_TF or case.system.dr[7] & _ENABLED):
            check_debugging(case)
        if case.path is not None and case.count != 1:
            raise UnsupportedCaseError("count: of an exit path unicorn runs one instruction")
        if case.emul_type:
            raise UnsupportedCaseError("emul_type: it means something to KVM only")
        if is_physical(case):
            if any(number >> _PHYSICAL_BITS - PAGE_SHIFT for number in case_memory(case).pages):
                raise UnsupportedCaseError(f"phys: unicorn has addresses of {_PHYSICAL_BITS} bits")
            return
        slots = sum(slot["size"] >> PAGE_SHIFT for slot in kvm_of(case).get("memslots") or ())
        if slots + len(case.mem.pages.keys() | devices_of(case).page_numbers()) > MAX_PAGES:
            raise UnsupportedCaseError(f"mem: more than {MAX_PAGES} pages")

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; the outcomes come in the same order."""
        run, other = self._run, self._run_other
        return [
            run(case)
            if case.extra is None and case.path is None and case.count == 1 and not case.port_in
            else other(case)
            for case in batch
        ]

    def _run_other(self, case: Case) -> Outcome:
        """A case that is more than one instruction on flat memory."""
        if case.count != 1:
            return run_several(case, self._stepper(case))
        return run_as_move(case, self._run_native)

    def _stepper(self, case: Case) -> RunStep:
        """What runs the steps of a case: devices keep their state from one to the next."""
        if case.extra is None and not case.port_in:
            return self._run_step
        devices, native = devices_of(judge_case(case)), self._native_runner()
        return lambda _step, whole: run_as_move(whole(), lambda case: native.run_case(case, devices))

    def _run_step(self, step: Case, whole: Callable[[], Case]) -> Outcome:
        """One of several instructions; all of the memory is built only if it looks at its own page."""
        before = self.exact_runs
        outcome = self._run(step)
        if self.exact_runs != before:
            template = self._use_template(step.system, step.mode)
            outcome = run_as_move(whole(), lambda case: self._run_exact(case, template))
        return outcome

    def _native_runner(self) -> NativeRunner:
        if self._native is None:
            self._native = NativeRunner()
        return self._native

    def _run_native(self, case: Case) -> Outcome:
        """A case that has more than flat memory, or enters through an exit path: as hardware would run it."""
        if case.path is not None and case.rflags & X86_EFLAGS_TF:
            plain = without_trap(case)
            return with_trap(_with_gaps(plain, self._run_native(plain)))
        if case.path == APIC_PATH:
            outcome = _with_gaps(case, self._native_runner().run_case(case))
            return settle_apic(case, outcome, _APIC_GAP)
        view, before = without_harness(case), self.exact_runs
        if view.extra or kvm_of(case).get("memslots") is not None or uses_ports(view):
            return self._native_runner().run_case(case)
        outcome = self._run(view)
        if self.exact_runs != before and forced_prefix(case):
            # It looks at its own code page, in which the prefix lies, too.
            outcome = self._run_exact(judge_case(case), self._use_template(case.system, case.mode))
        return outcome

    def close(self) -> None:
        """Release engines and memory."""
        super().close()
        if self._native is not None:
            self._native.close()
            self._native = None

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
        """What this oracle does not vouch for: (field or "all", gap id) pairs."""
        if case.count != 1:
            return outcome.unchecked or unchecked_steps(case, self._stepper(case), _gaps_of_step)
        plain = case.extra is None and outcome.extra is None
        return outcome.unchecked + find_gaps(PLAIN_LEDGER if plain else LEDGER, judge_case(case), outcome)

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """Its known gaps."""
        return LEDGER

    @property
    def capabilities(self) -> Capabilities:
        """All that there is."""
        return Capabilities(physical=True, devices=True, count=True, paths=True)

    def fingerprint(self) -> dict[str, str]:
        """Name, version and configuration of what runs."""
        return {"oracle": self.name, "unicorn": UNICORN_VERSION, "cpu": "Icelake-Server"}


def _with_gaps(case: Case, outcome: Outcome) -> Outcome:
    """What it does not vouch for, attached to an outcome that is going to be changed."""
    found = find_gaps(LEDGER, judge_case(case), outcome)
    outcome.unchecked += tuple(entry for entry in found if entry[1] != _APIC_GAP)
    return outcome


def _gaps_of_step(case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """The entries of the ledger that one of several instructions falls into."""
    plain = case.extra is None and outcome.extra is None
    return find_gaps(PLAIN_LEDGER if plain else LEDGER, case, outcome)
