"""An MMU with a plain vCPU, and a processor that accesses memory through KVM's translations."""

from __future__ import annotations

from dataclasses import dataclass, field

from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import GuestMemory, KvmMemslots
from emufuzz.kvm.mmu.hardware import EXIT_REASON_EPT_MISCONFIG, ept_exit, shadow_exit
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.mmu.page_fault import PageFaultResult, kvm_mmu_page_fault
from emufuzz.kvm.mmu.paging import valid_pdptes
from emufuzz.kvm.mmu.state import PlainPagingState
from emufuzz.kvm.mmu.tdp import EPT_MISCONFIG_ERROR_CODE, ept_violation_error_code
from emufuzz.kvm.options import KvmOptions


@dataclass(slots=True)
class FakeVcpu(PlainPagingState):
    rip: int = 0x1000
    smm: bool = False
    in_guest_mode: bool = False
    apicv_activated: bool = False
    reinjection: bool = False
    injected: list[X86Exception] = field(default_factory=list)

    def event_needs_reinjection(self) -> bool:
        return self.reinjection

    def inject_emulated_page_fault(self, fault: X86Exception) -> None:
        self.injected.append(fault)


def make_mmu(memory: GuestMemory, state: PlainPagingState | None = None, **knobs: object) -> KvmMmu:
    """An MMU; without EPT the host has 46 address bits, so that MMIO can be cached."""
    vcpu = FakeVcpu()
    if state is not None:
        for name in PlainPagingState.__dataclass_fields__:
            setattr(vcpu, name, getattr(state, name))
    if not knobs.get("ept", True):
        knobs = {"host_maxphyaddr": 46, "unrestricted_guest": False, **knobs}
    return KvmMmu(vcpu, memory, KvmOptions(**knobs))  # type: ignore[arg-type]  # knobs of several types


def ept_access(mmu: KvmMmu, gpa: int, access: int = 0) -> list[PageFaultResult]:
    """Access a guest physical address until it succeeds or is emulated; the results of all exits."""
    results: list[PageFaultResult] = []
    while (exited := ept_exit(mmu, gpa, access)) is not None:
        reason, qualification = exited
        misconfig = reason == EXIT_REASON_EPT_MISCONFIG
        error = EPT_MISCONFIG_ERROR_CODE if misconfig else ept_violation_error_code(qualification)
        results.append(kvm_mmu_page_fault(mmu, gpa, error))
        if results[-1].emulate:
            break
        assert len(results) < 8, "the guest does not get on"
    return results


def shadow_access(mmu: KvmMmu, gva: int, access: int = 0) -> list[PageFaultResult]:
    """As `ept_access` for a linear address; a #PF for the guest ends it too."""
    results: list[PageFaultResult] = []
    faults = len(mmu.vcpu.injected)  # type: ignore[attr-defined]  # FakeVcpu
    while (error := shadow_exit(mmu, gva, access)) is not None:
        results.append(kvm_mmu_page_fault(mmu, gva, error))
        if results[-1].emulate or len(mmu.vcpu.injected) > faults:  # type: ignore[attr-defined]  # FakeVcpu
            break
        assert len(results) < 8, "the guest does not get on"
    return results


def load_pdptrs(slots: KvmMemslots, cr3: int, maxphyaddr: int) -> tuple[int, ...] | None:
    """What MOV to CR3 would cache, None if it would be #GP."""
    data = slots.read_guest(cr3 & ~0x1F, 32)
    return None if data is None else valid_pdptes(data, maxphyaddr)
