"""The native oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome, is_physical
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.gaps import Gap, find_gaps
from emufuzz.oracle.local_apic import apic_of
from emufuzz.oracle.native.child import PATIENCE
from emufuzz.oracle.native.gaps import native_gaps
from emufuzz.oracle.native.host import host
from emufuzz.oracle.native.runner import NativeRunner
from emufuzz.oracle.native.selftest import self_test
from emufuzz.oracle.native.space import MODES
from emufuzz.oracle.native_view import check_judged, judge_case

_USER: Final = frozenset({3})


class NativeOracle:
    """The host's processor as an oracle (emufuzz.oracle.base.Oracle) for code at CPL 3."""

    name = "native"

    def __init__(self, patience: float = PATIENCE) -> None:
        """Look at the processor, start a child, and test what everything depends on.

        Args:
            patience: seconds without progress after which a case counts as hung.

        Raises:
            OracleUnavailableError: this is no x86-64 Linux, the kernel or a sandbox refuses something that
                the oracle needs, or a self-test fails.
        """
        self._host = host()
        self._gaps = native_gaps(self._host)
        self._runner = NativeRunner(patience)
        try:
            self_test(self._runner)
        except BaseException:
            self._runner.close()
            raise

    def check(self, case: Case) -> None:
        """Raise UnsupportedCaseError if this oracle cannot take the case."""
        check_judged(case)
        if case.count != 1:
            raise UnsupportedCaseError(f"count: native runs one instruction, got {case.count}")
        if case.emul_type:
            raise UnsupportedCaseError("emul_type: it means something to KVM only")
        if is_physical(case):
            raise UnsupportedCaseError("phys: the host has page tables of its own")
        if "devices" in (case.extra or {}) or apic_of(case):
            raise UnsupportedCaseError("devices: the host has none of them")
        self._runner.plan(0, judge_case(case))

    def run(self, batch: Sequence[Case]) -> list[Outcome]:
        """Run the cases; the outcomes come in the same order.

        Raises:
            UnsupportedCaseError: `check` would have refused one of them.
        """
        return self._runner.run(
            [case if case.extra is None and case.path is None else judge_case(case) for case in batch]
        )

    def unchecked(self, case: Case, outcome: Outcome) -> tuple[tuple[str, str], ...]:
        """What this oracle does not vouch for: (field or "all", gap id) pairs."""
        return outcome.unchecked + find_gaps(self._gaps, judge_case(case), outcome)

    @property
    def ledger(self) -> tuple[Gap, ...]:
        """Its known gaps, on this processor."""
        return tuple(self._gaps)

    @property
    def capabilities(self) -> Capabilities:
        """One instruction at CPL 3 in flat memory, protected or IA-32e mode."""
        vendor = self._host.vendor if self._host.vendor in {"amd", "intel"} else ""
        return Capabilities(modes=MODES, cpls=_USER, paths=True, vendor=vendor)

    def fingerprint(self) -> dict[str, str]:
        """Name of the oracle and identity of the processor."""
        found = self._host
        return {
            "oracle": self.name,
            "vendor": found.vendor,
            "family": str(found.family),
            "model": str(found.model),
            "stepping": str(found.stepping),
            "cpu": found.name,
        }

    def close(self) -> None:
        """End all children."""
        self._runner.close()
