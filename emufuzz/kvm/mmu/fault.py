"""One page fault on its way through KVM, and where its frame is found to be.

KVM: struct kvm_page_fault, kvm_faultin_pfn, kvm_handle_noslot_fault, kvm_handle_error_pfn,
page_fault_handle_page_track, fast_page_fault (Linux 6.12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emufuzz.kvm.memslots import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    KVM_MEM_READONLY,
    KVM_MEMSLOT_INVALID,
    MemorySlot,
)
from emufuzz.kvm.mmu.pferr import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_RETRY,
)

if TYPE_CHECKING:
    from emufuzz.kvm.mmu.mmu import KvmMmu


class PageFault:
    """struct kvm_page_fault. `slot` None after `kvm_faultin_pfn` means a hole, to be mapped as MMIO."""

    __slots__ = (
        "addr", "error_code", "fetch", "gfn", "is_tdp", "map_writable", "pfn", "present", "rsvd", "slot",
        "user", "write", "write_fault_to_shadow_pgtable",
    )  # fmt: skip

    def __init__(self, addr: int, error_code: int, *, is_tdp: bool) -> None:
        self.addr = addr
        self.error_code = error_code
        self.fetch = bool(error_code & PFERR_FETCH_MASK)
        self.write = bool(error_code & PFERR_WRITE_MASK)
        self.present = bool(error_code & PFERR_PRESENT_MASK)
        self.rsvd = bool(error_code & PFERR_RSVD_MASK)
        self.user = bool(error_code & PFERR_USER_MASK)
        self.is_tdp = is_tdp
        self.gfn = addr >> 12
        self.slot: MemorySlot | None = None
        self.pfn = 0
        self.map_writable = False
        self.write_fault_to_shadow_pgtable = False


def page_fault_handle_page_track(mmu: KvmMmu, fault: PageFault) -> bool:
    """A write to a mapped frame whose writes KVM must see; no entry can fix that."""
    if fault.rsvd or not fault.present or not fault.write:
        return False
    return mmu.is_write_tracked(fault.slot, fault.gfn)


def kvm_handle_noslot_fault(mmu: KvmMmu, fault: PageFault, access: int) -> int:
    """A hole: RET_PF_CONTINUE to install an MMIO SPTE, RET_PF_EMULATE where that is not possible."""
    gva = 0 if fault.is_tdp else fault.addr
    mmu.mmio.store(mmu.slots.generation, gva, fault.gfn, access & mmu.masks.mmio_access_mask)
    fault.slot = None
    fault.map_writable = False
    if not mmu.mmio_caching or fault.gfn > mmu.max_gfn:
        return RET_PF_EMULATE
    return RET_PF_CONTINUE


def kvm_faultin_pfn(mmu: KvmMmu, fault: PageFault, access: int) -> int:
    """Find the host frame. RET_PF_CONTINUE goes on to map it; `access` are the guest's ACC_* rights."""
    slot = fault.slot
    if slot is None:
        return kvm_handle_noslot_fault(mmu, fault, access)
    if slot.flags & KVM_MEMSLOT_INVALID:
        return RET_PF_RETRY
    if slot.id == APIC_ACCESS_PAGE_PRIVATE_MEMSLOT:
        if mmu.vcpu.in_guest_mode:
            return kvm_handle_noslot_fault(mmu, fault, access)
        if not mmu.vcpu.apicv_activated:
            return RET_PF_EMULATE
    if slot.flags & KVM_MEM_READONLY:
        if fault.write:
            return RET_PF_EMULATE  # not remembered as MMIO, since reads are fine
        fault.map_writable = False
    else:
        fault.map_writable = True
    fault.pfn = slot.userspace_pfn + fault.gfn - slot.base_gfn
    return RET_PF_CONTINUE
