"""A vCPU as its MMU sees it."""

from __future__ import annotations

from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.exceptions import kvm_event_needs_reinjection, kvm_inject_emulated_page_fault
from emufuzz.kvm.paging_state import VcpuPagingState
from emufuzz.kvm.regs import kvm_rip_read


class VcpuMmuState(VcpuPagingState):
    """A view of one vCPU for page faults (see `state.MmuVcpu`); it holds nothing of its own."""

    __slots__ = ()

    @property
    def rip(self) -> int:
        """RIP."""
        return kvm_rip_read(self.vcpu)

    @property
    def smm(self) -> bool:
        """The vCPU is in system management mode."""
        return self.vcpu.smm

    @property
    def in_guest_mode(self) -> bool:
        """L2 is running."""
        return self.vcpu.guest_mode is not None

    @property
    def apicv_activated(self) -> bool:
        """Hardware virtualises the APIC."""
        return self.vcpu.options.enable_apicv

    def event_needs_reinjection(self) -> bool:
        """An event was being delivered when the exit came."""
        return kvm_event_needs_reinjection(self.vcpu)

    def inject_emulated_page_fault(self, fault: X86Exception) -> None:
        """The guest gets a #PF of its own tables."""
        kvm_inject_emulated_page_fault(self.vcpu, fault)
