"""The Bochs oracle."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from typing import Final

from emufuzz.case.devices import devices_of
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_SHIFT, Case, Outcome, case_memory, code_address, is_physical
from emufuzz.oracle.base import Capabilities, OracleUnavailableError
from emufuzz.oracle.bochs.child import PATIENCE, Child, DeadChildError
from emufuzz.oracle.bochs.gaps import BOCHS_GAPS, BOCHS_VERSION
from emufuzz.oracle.bochs.selftest import self_test
from emufuzz.oracle.gaps import Gap, find_gaps
from emufuzz.oracle.local_apic import apic_of
from emufuzz.oracle.native_view import check_judged, judge_case, kvm_of

_PACKAGE: Final = "bochscpu-python"
_MAX_PAGES: Final = 2048
_PHYSICAL_BITS: Final = 40
_TF: Final = 1 << 8
_ENABLED: Final = 0xFF | 1 << 13
_LA57: Final = 1 << 12
_MAX_CODE: Final = 4096


class BochsOracle:
    """Bochs, in a child process, as an oracle (emufuzz.oracle.base.Oracle)."""

    name = "bochs"

    def __init__(self, patience: float = PATIENCE) -> None:
        """Start the child and test what everything depends on.

        Args:
            patience: seconds after which a case counts as hung.

        Raises:
            OracleUnavailableError: the extra `bochs` is not installed in the known version, the child does
                not start, or a self-test fails.
        """
        _check_version()
        self._patience = patience
        self._child: Child | None = None
        self.starts = 0
        try:
            self_test(self)
        except BaseException:
            self.close()
            raise

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if this oracle cannot take the case."""
        check_judged(case)
        if case.path is not None and case.rflags & _TF:
            raise UnsupportedCaseError("rflags: bochs is stopped before it would trap after an instruction")
        if case.path is not None and case.system.dr[7] & _ENABLED:
            raise UnsupportedCaseError("dr: bochs is stopped before it would trap at a breakpoint")
        if case.count != 1:
            raise UnsupportedCaseError(f"count: bochs runs one instruction, got {case.count}")
        if case.emul_type:
            raise UnsupportedCaseError("emul_type: it means something to KVM only")
        if case.system.cr4 & _LA57:
            raise UnsupportedCaseError("cr4: bochs runs with 4-level paging only")
        if kvm_of(case).get("memslots") is not None:
            raise UnsupportedCaseError("kvm.memslots: all memory of bochs is alike")
        if kvm_of(case).get("pkru"):
            raise UnsupportedCaseError("kvm.pkru: PKRU of bochs cannot be set")
        if devices_of(case).page_numbers() or apic_of(case):
            raise UnsupportedCaseError("devices: bochs has no memory-mapped ones")
        _check_memory(case)

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; the outcomes come in the same order."""
        outcomes: list[Outcome] = []
        while len(outcomes) < len(batch):
            rest = batch[len(outcomes) :]
            try:
                outcomes.extend(self._started().run(rest))
            except DeadChildError as error:
                self.close()
                outcomes.append(_ended(batch[len(outcomes)], error))
        return outcomes

    def _started(self) -> Child:
        """The child, a new one if there is none."""
        if self._child is None:
            self._child = Child(self._patience)
            self.starts += 1
        return self._child

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
        """What this oracle does not vouch for: (field or "all", gap id) pairs."""
        return outcome.unchecked + find_gaps(BOCHS_GAPS, judge_case(case), outcome)

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """Its known gaps."""
        return BOCHS_GAPS

    @property
    def capabilities(self) -> Capabilities:
        """One instruction in every mode, at every level; ports, but no memory-mapped devices."""
        return Capabilities(physical=True, paths=True, cost="dear")

    def fingerprint(self) -> dict[str, str]:
        """Name, version and configuration of what runs."""
        return {"oracle": self.name, "bochscpu-python": BOCHS_VERSION, "cpu": "Tiger Lake"}

    def close(self) -> None:
        """End the child; more than once is no error."""
        child, self._child = self._child, None
        if child is not None:
            child.close()


def _check_version() -> None:
    try:
        version = importlib.metadata.version(_PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        raise OracleUnavailableError(f"bochs: {_PACKAGE} is missing; install emufuzz[bochs]") from None
    if version != BOCHS_VERSION:
        raise OracleUnavailableError(f"bochs: {_PACKAGE} is {version}, not {BOCHS_VERSION}")


def _check_memory(case: Case) -> None:
    """Pages must fit into the child's memory, physical ones between what Bochs has there."""
    pages = case_memory(case).pages
    if len(pages) > _MAX_PAGES:
        raise UnsupportedCaseError(f"mem: more than {_MAX_PAGES} pages")
    if len(case.code) > _MAX_CODE:
        raise UnsupportedCaseError(f"code: more than {_MAX_CODE} bytes")
    end = 1 << 64 if case.mode == "prot64" else 1 << 32
    if code_address(case) + len(case.code) > end:
        raise UnsupportedCaseError("code: it goes over the end of the address space")
    if is_physical(case) and any(number >> _PHYSICAL_BITS - PAGE_SHIFT for number in pages):
        raise UnsupportedCaseError(f"phys: bochs has addresses of {_PHYSICAL_BITS} bits")


def _ended(case: Case, error: DeadChildError) -> Outcome:
    """The outcome of the case that ended a child."""
    outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system)
    if error.hang:
        outcome.hang = True
    else:
        outcome.crash = f"bochs: {error}"
    return outcome
