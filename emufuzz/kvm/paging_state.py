"""What the guest page walker reads of a vCPU, always through the register cache."""

from __future__ import annotations

from collections.abc import Sequence

from emufuzz.kvm.regs import kvm_pdptr_read, kvm_read_cr0, kvm_read_cr3, kvm_read_cr4
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import vmx_get_cpl
from emufuzz.kvm.vcpu import Vcpu


class VcpuPagingState:
    """A view of one vCPU for translations; it holds nothing of its own."""

    __slots__ = ("vcpu",)

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu

    @property
    def cr0(self) -> int:
        """CR0."""
        return kvm_read_cr0(self.vcpu)

    @property
    def cr3(self) -> int:
        """CR3."""
        return kvm_read_cr3(self.vcpu)

    @property
    def cr4(self) -> int:
        """CR4."""
        return kvm_read_cr4(self.vcpu)

    @property
    def efer(self) -> int:
        """EFER."""
        return self.vcpu.efer

    @property
    def rflags(self) -> int:
        """RFLAGS, for AC."""
        return vmx_get_rflags(self.vcpu)

    def cpl(self) -> int:
        """CPL."""
        return vmx_get_cpl(self.vcpu)

    @property
    def pkru(self) -> int:
        """PKRU."""
        return self.vcpu.pkru

    @property
    def maxphyaddr(self) -> int:
        """Bits of a guest-physical address."""
        return self.vcpu.cpuid.maxphyaddr

    @property
    def has_gbpages(self) -> bool:
        """1 GiB pages: with EPT the host decides, which has them; else the guest's CPUID."""
        return self.vcpu.options.ept or self.vcpu.cpuid.has("gbpages")

    @property
    def amd_compatible(self) -> bool:
        """The guest is an AMD or Hygon processor."""
        return self.vcpu.cpuid.amd_compatible

    @property
    def pdptrs(self) -> Sequence[int]:
        """The four cached PDPTEs."""
        kvm_pdptr_read(self.vcpu, 0)
        return self.vcpu.pdptrs
