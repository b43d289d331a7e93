"""Direct translation: guest physical frames to host frames, through EPT or for a guest without paging.

KVM: kvm_tdp_page_fault, fast_page_fault, tdp_mmu_map_handle_target_level, direct_map (Linux 6.12).
Everything is mapped in pages of 4 KiB.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.kvm.memslots import KVM_MEM_LOG_DIRTY_PAGES
from emufuzz.kvm.mmu.fault import PageFault, kvm_faultin_pfn, page_fault_handle_page_track
from emufuzz.kvm.mmu.pferr import (
    ACC_ALL,
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT_WRITABLE_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
)
from emufuzz.kvm.mmu.spte import (
    SHADOW_NONPRESENT_VALUE,
    VMX_EPT_RWX_MASK,
    is_shadow_present_pte,
)

if TYPE_CHECKING:
    from emufuzz.kvm.mmu.mmu import KvmMmu

# Exit qualification of an EPT violation.
EPT_VIOLATION_ACC_READ: Final = 1 << 0
EPT_VIOLATION_ACC_WRITE: Final = 1 << 1
EPT_VIOLATION_ACC_INSTR: Final = 1 << 2
EPT_VIOLATION_RWX_SHIFT: Final = 3
EPT_VIOLATION_GVA_IS_VALID: Final = 1 << 7
EPT_VIOLATION_GVA_TRANSLATED: Final = 1 << 8


def fast_page_fault(mmu: KvmMmu, fault: PageFault) -> int:
    """Give W back to an entry that lost it to dirty logging; RET_PF_INVALID if that is not the matter.

    Only write-protection is a matter here: with accessed bits in hardware no entry is tracked by
    being made inaccessible.
    """
    if fault.rsvd or not fault.present or not fault.write:
        return RET_PF_INVALID
    entries, masks = mmu.direct_map, mmu.masks
    spte = entries.get(fault.gfn, SHADOW_NONPRESENT_VALUE)
    if not is_shadow_present_pte(spte):
        return RET_PF_INVALID
    if spte & PT_WRITABLE_MASK:
        mmu.stats["pf_fast"] += 1
        return RET_PF_SPURIOUS
    if not spte & masks.mmu_writable:
        return RET_PF_INVALID
    entries[fault.gfn] = spte | PT_WRITABLE_MASK
    mmu.slots.mark_page_dirty(fault.gfn)
    mmu.stats["pf_fast"] += 1
    return RET_PF_FIXED


def direct_page_fault(mmu: KvmMmu, fault: PageFault) -> int:
    """A fault on a guest physical address (KVM: kvm_tdp_page_fault, nonpaging_page_fault)."""
    if page_fault_handle_page_track(mmu, fault):
        return RET_PF_WRITE_PROTECTED
    r = fast_page_fault(mmu, fault)
    if r != RET_PF_INVALID:
        return r
    r = kvm_faultin_pfn(mmu, fault, ACC_ALL)
    return r if r != RET_PF_CONTINUE else direct_map(mmu, fault)


def direct_map(mmu: KvmMmu, fault: PageFault) -> int:
    """Install the entry (KVM: tdp_mmu_map_handle_target_level)."""
    entries = mmu.direct_map
    gfn, slot = fault.gfn, fault.slot
    if slot is None:
        entries[gfn] = mmu.masks.make_mmio_spte(mmu.slots.generation, gfn, ACC_ALL)
        mmu.stats["pf_mmio_spte_created"] += 1
        return RET_PF_EMULATE
    old = entries.get(gfn, SHADOW_NONPRESENT_VALUE)
    wrprot = fault.map_writable and not mmu.shadow.try_to_unsync_pages(slot, gfn, can_unsync=True)
    spte = mmu.masks.make_spte(ACC_ALL, fault.pfn, host_writable=fault.map_writable, wrprot=wrprot)
    if spte & PT_WRITABLE_MASK and slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
        mmu.slots.mark_page_dirty(gfn)
    entries[gfn] = spte
    if wrprot and fault.write:
        return RET_PF_WRITE_PROTECTED
    return RET_PF_SPURIOUS if spte == old else RET_PF_FIXED


def ept_violation_error_code(qualification: int) -> int:
    """The error code for `kvm_mmu_page_fault` (KVM: __vmx_handle_ept_violation)."""
    error = PFERR_USER_MASK if qualification & EPT_VIOLATION_ACC_READ else 0
    error |= PFERR_WRITE_MASK if qualification & EPT_VIOLATION_ACC_WRITE else 0
    error |= PFERR_FETCH_MASK if qualification & EPT_VIOLATION_ACC_INSTR else 0
    error |= PFERR_PRESENT_MASK if qualification >> EPT_VIOLATION_RWX_SHIFT & VMX_EPT_RWX_MASK else 0
    if qualification & EPT_VIOLATION_GVA_IS_VALID:
        final = qualification & EPT_VIOLATION_GVA_TRANSLATED
        error |= PFERR_GUEST_FINAL_MASK if final else PFERR_GUEST_PAGE_MASK
    return error


#: The error code that an EPT misconfiguration is handled with.
EPT_MISCONFIG_ERROR_CODE: Final = PFERR_RSVD_MASK
