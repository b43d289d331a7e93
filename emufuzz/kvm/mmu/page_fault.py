"""From a page-fault exit to what is done about it: resume the guest, or emulate, and how.

KVM: kvm_mmu_page_fault, kvm_mmu_do_page_fault, kvm_mmu_write_protect_fault,
__kvm_mmu_unprotect_gfn_and_retry (Linux 6.12).
"""

from __future__ import annotations

from typing import NamedTuple

from emufuzz.kvm.mmu.fault import PageFault
from emufuzz.kvm.mmu.mmio import handle_mmio_page_fault, mmio_info_in_cache
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.mmu.pferr import (
    EMULTYPE_ALLOW_RETRY_PF,
    EMULTYPE_PF,
    EMULTYPE_WRITE_PF_TO_SP,
    INVALID_GPA,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_INVALID,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
    RET_PF_WRITE_PROTECTED,
)
from emufuzz.kvm.mmu.shadow_fault import shadow_page_fault
from emufuzz.kvm.mmu.tdp import direct_page_fault

_WRITE_TO_GUEST_TABLE = PFERR_GUEST_PAGE_MASK | PFERR_WRITE_MASK | PFERR_PRESENT_MASK
_STATS = {RET_PF_FIXED: "pf_fixed", RET_PF_EMULATE: "pf_emulate", RET_PF_SPURIOUS: "pf_spurious"}


class PageFaultResult(NamedTuple):
    """What to do after a page fault.

    `result` is RET_PF_EMULATE (call x86_emulate_instruction with `emulation_type`), or RET_PF_RETRY,
    RET_PF_FIXED, RET_PF_SPURIOUS (resume the guest: the exit handler returns 1). KVM's negative
    errors come from private memory, host page faults and signals, which are not modelled.
    """

    result: int
    emulation_type: int

    @property
    def emulate(self) -> bool:
        """The instruction is to be emulated."""
        return self.result == RET_PF_EMULATE


def kvm_mmu_do_page_fault(mmu: KvmMmu, addr: int, error_code: int) -> tuple[int, int]:
    """Let the MMU of the mode handle a fault: (RET_PF_*, EMULTYPE_* bits to add)."""
    fault = PageFault(addr, error_code, is_tdp=mmu.options.ept)
    if mmu.direct:
        fault.slot = mmu.slots.gfn_to_memslot(fault.gfn)
        r = direct_page_fault(mmu, fault)
    else:
        r = shadow_page_fault(mmu, fault)
    return r, EMULTYPE_WRITE_PF_TO_SP if fault.write_fault_to_shadow_pgtable else 0


def kvm_mmu_page_fault(mmu: KvmMmu, cr2_or_gpa: int, error_code: int) -> PageFaultResult:
    """Handle a page-fault exit.

    Args:
        mmu: The vCPU's MMU.
        cr2_or_gpa: Guest physical address with EPT, else the linear address of the #PF.
        error_code: As of a #PF; PFERR_RSVD_MASK alone for an EPT misconfiguration.
    """
    emulation_type = EMULTYPE_PF
    r = RET_PF_INVALID
    if error_code & PFERR_RSVD_MASK:
        r = handle_mmio_page_fault(mmu, cr2_or_gpa, direct=mmu.direct)
        if r == RET_PF_EMULATE:
            return PageFaultResult(r, emulation_type)
    if r == RET_PF_INVALID:
        mmu.stats["pf_taken"] += 1
        r, more = kvm_mmu_do_page_fault(mmu, cr2_or_gpa, error_code)
        emulation_type |= more
    if r == RET_PF_WRITE_PROTECTED:
        r, more = kvm_mmu_write_protect_fault(mmu, cr2_or_gpa, error_code)
        emulation_type |= more
    if r in _STATS:
        mmu.stats[_STATS[r]] += 1
    return PageFaultResult(r, emulation_type)


def kvm_mmu_write_protect_fault(mmu: KvmMmu, cr2_or_gpa: int, error_code: int) -> tuple[int, int]:
    """A write to a frame whose writes KVM must see: (RET_PF_EMULATE or _RETRY, EMULTYPE_* bits to add).

    Emulation is right unless the processor itself wrote (to the guest's tables), or emulation would
    delay an event that waits to be delivered again. Then the table is given up and the guest
    resumes; the same fault once more is emulated all the same, or it would never end.
    """
    vcpu, direct = mmu.vcpu, mmu.direct
    if mmu.last_retry_eip == vcpu.rip and mmu.last_retry_addr == cr2_or_gpa:
        return RET_PF_EMULATE, 0
    mmu.last_retry_eip = 0
    mmu.last_retry_addr = 0
    if mmio_info_in_cache(mmu, cr2_or_gpa, direct=direct):
        return RET_PF_EMULATE, 0
    if direct:
        unprotect = error_code & _WRITE_TO_GUEST_TABLE == _WRITE_TO_GUEST_TABLE
    else:
        unprotect = vcpu.event_needs_reinjection()
    if unprotect and kvm_mmu_unprotect_gfn_and_retry(mmu, cr2_or_gpa):
        return RET_PF_RETRY, 0
    return RET_PF_EMULATE, 0 if vcpu.in_guest_mode else EMULTYPE_ALLOW_RETRY_PF


def kvm_mmu_unprotect_gfn_and_retry(mmu: KvmMmu, cr2_or_gpa: int, *, always_retry: bool = False) -> bool:
    """Give up the shadow pages of a frame so that the guest may write to it natively; False if it has none.

    Args:
        mmu: The vCPU's MMU.
        cr2_or_gpa: The faulting address.
        always_retry: Remember the retry even if there was nothing to give up.
    """
    zapped = False
    if mmu.shadow.indirect_shadow_pages:
        gpa = cr2_or_gpa
        if not mmu.direct:
            user = PFERR_USER_MASK if mmu.vcpu.cpl() == 3 else 0
            gpa = mmu.gva_to_gpa(cr2_or_gpa, PFERR_WRITE_MASK | user)
        if gpa != INVALID_GPA:
            pages = mmu.shadow.indirect_pages(gpa >> 12)
            for sp in pages:
                if not sp.invalid:
                    mmu.shadow.zap(sp)
            zapped = bool(pages)
    if zapped:
        mmu.flushes["remote_tlb"] += 1
    if zapped or always_retry:
        mmu.last_retry_eip = mmu.vcpu.rip
        mmu.last_retry_addr = cr2_or_gpa
    return zapped
