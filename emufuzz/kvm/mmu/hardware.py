"""What the processor does with KVM's translations: go through, or take a VM exit.

This is not in KVM. It tells which exit an access of the guest raises, so that the exit handlers
start from what hardware would have reported. SDM Vol. 3C 28.3.3 "EPT-Induced VM Exits", Table 28-7
"Exit Qualification for EPT Violations"; Vol. 3A 4.7 for the #PF of shadow paging.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.arch.cr import X86_CR0_PG, X86_CR4_SMAP
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.mmu.paging import guest_paging, permission_bitmask
from emufuzz.kvm.mmu.pferr import (
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from emufuzz.kvm.mmu.spte import (
    SHADOW_NONPRESENT_VALUE,
    VMX_EPT_EXECUTABLE_MASK,
    VMX_EPT_READABLE_MASK,
    VMX_EPT_RWX_MASK,
    VMX_EPT_WRITABLE_MASK,
    is_shadow_present_pte,
)
from emufuzz.kvm.mmu.state import PlainPagingState
from emufuzz.kvm.mmu.tdp import (
    EPT_VIOLATION_ACC_INSTR,
    EPT_VIOLATION_ACC_READ,
    EPT_VIOLATION_ACC_WRITE,
    EPT_VIOLATION_GVA_IS_VALID,
    EPT_VIOLATION_GVA_TRANSLATED,
    EPT_VIOLATION_RWX_SHIFT,
)
from emufuzz.kvm.mmu.walker import GuestWalker, walk_addr_generic

EXIT_REASON_EPT_VIOLATION: Final = 48
EXIT_REASON_EPT_MISCONFIG: Final = 49


class EptAccess(NamedTuple):
    """What an access of an EPT guest comes to.

    `exit_reason` is 0 if there is no exit: then `fault` is the #PF that the guest gets from its own
    tables, or None if the access reached `gpa`. With an exit `gpa` is what GUEST_PHYSICAL_ADDRESS
    holds, and `qualification` is that of an EPT violation.
    """

    exit_reason: int
    qualification: int
    gpa: int
    fault: X86Exception | None = None


def ept_exit(mmu: KvmMmu, gpa: int, access: int) -> tuple[int, int] | None:
    """The exit for one physical access: (exit reason, exit qualification), None if it has none.

    Every access is that of a linear address, or to the tables that translate one.

    Args:
        mmu: An MMU with EPT.
        gpa: Guest physical address.
        access: PFERR_WRITE_MASK or PFERR_FETCH_MASK, or neither for a read; PFERR_GUEST_FINAL_MASK
            for a translated access; PFERR_GUEST_PAGE_MASK for one to the guest's tables, which
            counts as a write because KVM turns on EPT's accessed and dirty flags.
    """
    spte = mmu.direct_map.get(gpa >> 12, SHADOW_NONPRESENT_VALUE)
    if mmu.masks.is_mmio_spte(spte):
        return EXIT_REASON_EPT_MISCONFIG, 0
    if access & PFERR_GUEST_PAGE_MASK:
        needed, what = VMX_EPT_WRITABLE_MASK, EPT_VIOLATION_ACC_READ | EPT_VIOLATION_ACC_WRITE
    elif access & PFERR_WRITE_MASK:
        needed, what = VMX_EPT_WRITABLE_MASK, EPT_VIOLATION_ACC_WRITE
    elif access & PFERR_FETCH_MASK:
        needed, what = VMX_EPT_EXECUTABLE_MASK, EPT_VIOLATION_ACC_INSTR
    else:
        needed, what = VMX_EPT_READABLE_MASK, EPT_VIOLATION_ACC_READ
    rights = spte & VMX_EPT_RWX_MASK if is_shadow_present_pte(spte) else 0
    if rights & needed:
        return None
    qualification = what | rights << EPT_VIOLATION_RWX_SHIFT | EPT_VIOLATION_GVA_IS_VALID
    if access & PFERR_GUEST_FINAL_MASK:
        qualification |= EPT_VIOLATION_GVA_TRANSLATED
    return EXIT_REASON_EPT_VIOLATION, qualification


def ept_guest_access(mmu: KvmMmu, gva: int, access: int) -> EptAccess:
    """An access to a linear address with EPT: the guest's tables first, then the page.

    Accessed and dirty flags of the guest are set even if an exit comes before; the access that
    succeeds in the end sets the same ones.

    Args:
        mmu: An MMU with EPT.
        gva: Linear address.
        access: PFERR_WRITE/USER/FETCH_MASK and PFERR_IMPLICIT_ACCESS.
    """
    vcpu, gpa = mmu.vcpu, gva
    if vcpu.cr0 & X86_CR0_PG or mmu.hidden is not None:
        walker = _processor_walk(mmu, gva, access)
        for level in range(walker.max_level, walker.level - 1, -1):
            table = walker.pte_gpa[level]
            exited = ept_exit(mmu, table, PFERR_GUEST_PAGE_MASK)
            if exited is not None:
                return EptAccess(*exited, table)
        if walker.fault is not None:
            return EptAccess(0, 0, 0, walker.fault)
        gpa = walker.gfn << 12 | gva & 0xFFF
    exited = ept_exit(mmu, gpa, access | PFERR_GUEST_FINAL_MASK)
    return EptAccess(0, 0, gpa) if exited is None else EptAccess(*exited, gpa)


def _processor_walk(mmu: KvmMmu, gva: int, access: int) -> GuestWalker:
    """The walk of the processor, for which bits beyond its own MAXPHYADDR are reserved, not the guest's."""
    vcpu, bits = mmu.vcpu, mmu.options.host_maxphyaddr
    if mmu.hidden is not None or vcpu.maxphyaddr == bits:
        return mmu.walk(gva, access)
    state = PlainPagingState(
        vcpu.cr0, vcpu.cr3, vcpu.cr4, vcpu.efer, vcpu.rflags, vcpu.pkru, vcpu.pdptrs, bits,
        vcpu.has_gbpages, vcpu.amd_compatible, vcpu.cpl(),
    )  # fmt: skip
    return walk_addr_generic(state, mmu.slots, gva, access)


def shadow_exit(mmu: KvmMmu, gva: int, access: int) -> int | None:
    """The error code of the #PF that the shadow tables raise, None if the access goes through.

    Args:
        mmu: An MMU without EPT; the guest has paging on or not.
        gva: Linear address, which without paging is the physical one.
        access: PFERR_WRITE/USER/FETCH_MASK and PFERR_IMPLICIT_ACCESS.
    """
    vcpu, masks = mmu.vcpu, mmu.masks
    bits = access & (PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK)
    spte = mmu.get_spte(gva)
    if masks.is_mmio_spte(spte):
        return bits | PFERR_PRESENT_MASK | PFERR_RSVD_MASK
    if not is_shadow_present_pte(spte):
        return bits
    index = bits
    if vcpu.rflags & X86_EFLAGS_AC and not access & PFERR_IMPLICIT_ACCESS:
        index |= PFERR_RSVD_MASK
    # KVM runs the guest with CR0.WP and EFER.NX set, whatever the guest thinks it has.
    # SMEP and SMAP are the guest's own, but only while it has paging on.
    smap = bool(vcpu.cr4 & X86_CR4_SMAP) and not mmu.direct
    smep = guest_paging(vcpu).smep and not mmu.direct
    permissions = permission_bitmask(True, True, smep, smap)
    if permissions[index >> 1] >> masks.access(spte) & 1:
        return bits | PFERR_PRESENT_MASK
    return None
