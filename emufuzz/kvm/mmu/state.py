"""What the guest walker and the MMU ask of a vCPU.

`PagingState` is everything that translation of a linear address depends on besides memory;
`PlainPagingState` is the simplest thing that satisfies it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from emufuzz.emulator.ctxt import X86Exception


class PagingState(Protocol):
    """Registers and CPUID facts that paging depends on (SDM Vol. 3A 4.1 "Paging Modes and Control Bits")."""

    @property
    def cr0(self) -> int:
        """CR0."""

    @property
    def cr3(self) -> int:
        """CR3."""

    @property
    def cr4(self) -> int:
        """CR4."""

    @property
    def efer(self) -> int:
        """IA32_EFER."""

    @property
    def rflags(self) -> int:
        """RFLAGS, of which AC counts."""

    @property
    def pkru(self) -> int:
        """PKRU, which counts with CR4.PKE only."""

    @property
    def pdptrs(self) -> Sequence[int]:
        """The four cached PDPTEs of PAE paging."""

    @property
    def maxphyaddr(self) -> int:
        """The guest's physical address width in bits."""

    @property
    def has_gbpages(self) -> bool:
        """The guest has 1 GiB pages."""

    @property
    def amd_compatible(self) -> bool:
        """The guest is an AMD or Hygon processor."""

    def cpl(self) -> int:
        """The current privilege level: SS.DPL, 0 in real mode."""


class MmuVcpu(PagingState, Protocol):
    """What page-fault handling needs of a vCPU besides its paging state."""

    @property
    def rip(self) -> int:
        """RIP."""

    @property
    def smm(self) -> bool:
        """The vCPU is in system management mode."""

    @property
    def in_guest_mode(self) -> bool:
        """L2 is running (KVM: is_guest_mode)."""

    @property
    def apicv_activated(self) -> bool:
        """Hardware virtualises the APIC (KVM: kvm_apicv_activated)."""

    def event_needs_reinjection(self) -> bool:
        """An event was being delivered when the exit came (KVM: kvm_event_needs_reinjection)."""

    def inject_emulated_page_fault(self, fault: X86Exception) -> None:
        """The guest's own tables refuse the access: it gets the #PF."""


@dataclass(slots=True)
class PlainPagingState:
    """Paging state as plain values; the defaults are a processor after reset at CPL 0."""

    cr0: int = 0x10
    cr3: int = 0
    cr4: int = 0
    efer: int = 0
    rflags: int = 2
    pkru: int = 0
    pdptrs: Sequence[int] = (0, 0, 0, 0)
    maxphyaddr: int = 52
    has_gbpages: bool = True
    amd_compatible: bool = False
    current_cpl: int = 0

    def cpl(self) -> int:
        """The current privilege level."""
        return self.current_cpl
