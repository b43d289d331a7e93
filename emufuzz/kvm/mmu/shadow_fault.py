"""Page faults with shadow paging: the guest's own, those that KVM fixes, and those it emulates.

KVM: FNAME(page_fault), FNAME(fetch), mmu_set_spte (Linux 6.12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from emufuzz.kvm.mmu.fault import PageFault, kvm_faultin_pfn, page_fault_handle_page_track
from emufuzz.kvm.mmu.paging import GuestPaging, guest_paging
from emufuzz.kvm.mmu.pferr import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PFERR_RSVD_MASK,
    RET_PF_CONTINUE,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
)
from emufuzz.kvm.mmu.shadow_page import ShadowPage, spte_index
from emufuzz.kvm.mmu.spte import SHADOW_NONPRESENT_VALUE
from emufuzz.kvm.mmu.walker import GuestWalker

if TYPE_CHECKING:
    from emufuzz.kvm.mmu.mmu import KvmMmu


def shadow_page_fault(mmu: KvmMmu, fault: PageFault) -> int:
    """Handle a #PF of a guest with shadow paging (KVM: FNAME(page_fault)); a RET_PF_*.

    If the guest's tables refuse the access, the guest gets its #PF and the result is RET_PF_RETRY.
    """
    vcpu = mmu.vcpu
    walker = mmu.walk(fault.addr, fault.error_code & ~PFERR_RSVD_MASK)
    if walker.fault is not None:
        vcpu.inject_emulated_page_fault(walker.fault)
        return RET_PF_RETRY
    fault.gfn = walker.gfn
    fault.slot = mmu.slots.gfn_to_memslot(fault.gfn)
    if page_fault_handle_page_track(mmu, fault):
        for sp in mmu.shadow.walk(fault.addr):
            sp.write_flooding_count = 0
        return RET_PF_WRITE_PROTECTED
    r = kvm_faultin_pfn(mmu, fault, walker.pte_access)
    if r != RET_PF_CONTINUE:
        return r
    paging = guest_paging(vcpu)
    _supervisor_write(fault, walker, paging)
    return fetch(mmu, fault, walker, paging)


def _supervisor_write(fault: PageFault, walker: GuestWalker, paging: GuestPaging) -> None:
    """CR0.WP = 0 lets the supervisor write to a read-only page, but hardware runs with WP = 1.

    The page becomes writable for the supervisor alone, and not executable if SMEP would have
    forbidden that for the user page it was.
    """
    if not fault.write or walker.pte_access & ACC_WRITE_MASK or paging.wp or fault.user or fault.slot is None:
        return
    walker.pte_access = (walker.pte_access | ACC_WRITE_MASK) & ~ACC_USER_MASK
    if paging.smep:
        walker.pte_access &= ~ACC_EXEC_MASK


def _gpte_changed(mmu: KvmMmu, walker: GuestWalker, level: int, size: int) -> bool:
    """The guest's entry is no longer what the walk saw."""
    data = mmu.slots.read_guest(walker.pte_gpa[level], size)
    return data is None or int.from_bytes(data, "little") != walker.ptes[level]


def fetch(mmu: KvmMmu, fault: PageFault, walker: GuestWalker, paging: GuestPaging) -> int:
    """Build the shadow tables down to the leaf (KVM: FNAME(fetch))."""
    shadow = mmu.shadow
    size = 4 if paging.has_4_byte_gpte else 8
    sp = shadow.root_for(fault.addr, paging)
    if sp is None or _gpte_changed(mmu, walker, walker.max_level, size):
        shadow.unload()
        return RET_PF_RETRY
    while sp.role.level > walker.level:
        sp.write_flooding_count = 0
        below = sp.role.level - 1
        table_gfn = walker.table_gfn[below]
        index = spte_index(fault.addr, sp.role.level)
        sp = shadow.child_sp(sp, index, table_gfn, False, walker.pt_access[below], paging)
        if sp.invalid or _gpte_changed(mmu, walker, below, size):
            return RET_PF_RETRY
        if fault.write and table_gfn == fault.gfn:
            fault.write_fault_to_shadow_pgtable = True
    sp.write_flooding_count = 0
    while sp.role.level > 1:
        level = sp.role.level
        base_gfn = fault.gfn & ~((1 << 9 * (level - 1)) - 1)
        index = spte_index(fault.addr, level)
        sp = shadow.child_sp(sp, index, base_gfn, True, walker.pte_access, paging)
    return mmu_set_spte(mmu, sp, fault, walker.pte_access)


def mmu_set_spte(mmu: KvmMmu, sp: ShadowPage, fault: PageFault, pte_access: int) -> int:
    """Install the leaf entry (KVM: mmu_set_spte)."""
    shadow, gfn = mmu.shadow, fault.gfn
    index = spte_index(fault.addr, 1)
    old = sp.spt.get(index, SHADOW_NONPRESENT_VALUE)
    if fault.slot is None:
        mmu.stats["pf_mmio_spte_created"] += 1
        spte = mmu.masks.make_mmio_spte(mmu.slots.generation, gfn, pte_access)
        shadow.set_leaf(sp, index, spte, None)
        return RET_PF_EMULATE
    spte, wrprot = shadow.make_spte(fault.slot, pte_access, gfn, fault.pfn, fault.map_writable, True)
    shadow.set_leaf(sp, index, spte, (gfn, pte_access))
    if wrprot and fault.write:
        return RET_PF_WRITE_PROTECTED
    return RET_PF_SPURIOUS if spte == old else RET_PF_FIXED
