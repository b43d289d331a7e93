"""Control registers: which values the guest may load, and what hardware gets instead.

KVM: kvm_set_cr0, kvm_set_cr3, kvm_set_cr4, kvm_set_cr8, kvm_lmsw, load_pdptrs,
kvm_post_set_cr0, kvm_post_set_cr4, vmx_set_cr0, vmx_set_cr4, enter_lmode, vmx_set_efer,
set_cr4_guest_host_mask. SDM Vol. 3A 2.5 "Control Registers", Vol. 3C 24.6.6.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.address import X86_CR3_LAM_U48, X86_CR3_LAM_U57
from emufuzz.kvm.cpuid import X86_CR4_PKE, X86_CR4_VMXE
from emufuzz.kvm.guest_state import vmx_emulation_required
from emufuzz.kvm.lapic_irq import kvm_lapic_get_cr8, kvm_lapic_set_tpr
from emufuzz.kvm.mmu.paging import valid_pdptes
from emufuzz.kvm.regs import (
    KVM_POSSIBLE_CR0_GUEST_BITS,
    KVM_POSSIBLE_CR4_GUEST_BITS,
    is_long_mode,
    is_pae,
    is_pae_paging,
    is_paging,
    kvm_read_cr0,
    kvm_read_cr0_bits,
    kvm_read_cr3,
    kvm_read_cr4,
    kvm_read_cr4_bits,
    kvm_register_mark_available,
    kvm_register_mark_dirty,
)
from emufuzz.kvm.rmode import enter_pmode, enter_rmode
from emufuzz.kvm.segments import is_64_bit_mode, vmx_get_cs_db_l_bits, vmx_segment_cache_clear
from emufuzz.kvm.vcpu import (
    KVM_REQ_LOAD_MMU_PGD,
    KVM_REQ_TLB_FLUSH_CURRENT,
    KVM_REQ_TLB_FLUSH_GUEST,
    VCPU_EXREG_CR0,
    VCPU_EXREG_CR3,
    VCPU_EXREG_CR4,
    VCPU_EXREG_PDPTR,
    Vcpu,
)
from emufuzz.kvm.vmx_bits import (
    CPU_BASED_CR3_LOAD_EXITING,
    CPU_BASED_CR3_STORE_EXITING,
    SECONDARY_EXEC_DESC,
    VM_ENTRY_IA32E_MODE,
    VMX_AR_TYPE_BUSY_64_TSS,
    VMX_AR_TYPE_MASK,
)

X86_CR3_PCID_NOFLUSH: Final = 1 << 63
X86_CR3_PCID_MASK: Final = 0xFFF

CR0_KNOWN: Final = (
    crs.X86_CR0_PE | crs.X86_CR0_MP | crs.X86_CR0_EM | crs.X86_CR0_TS | crs.X86_CR0_ET | crs.X86_CR0_NE
    | crs.X86_CR0_WP | crs.X86_CR0_AM | crs.X86_CR0_NW | crs.X86_CR0_CD | crs.X86_CR0_PG
)  # fmt: skip
X86_CR0_PDPTR_BITS: Final = crs.X86_CR0_CD | crs.X86_CR0_NW | crs.X86_CR0_PG
X86_CR4_PDPTR_BITS: Final = crs.X86_CR4_PGE | crs.X86_CR4_PSE | crs.X86_CR4_PAE | crs.X86_CR4_SMEP
X86_CR4_TLBFLUSH_BITS: Final = crs.X86_CR4_PGE | crs.X86_CR4_PCIDE | crs.X86_CR4_PAE | crs.X86_CR4_SMEP
KVM_MMU_CR0_ROLE_BITS: Final = crs.X86_CR0_PG | crs.X86_CR0_WP
KVM_MMU_CR4_ROLE_BITS: Final = (
    crs.X86_CR4_PSE | crs.X86_CR4_PAE | crs.X86_CR4_LA57 | crs.X86_CR4_SMEP | crs.X86_CR4_SMAP | X86_CR4_PKE
)

_CR3_EXITING_BITS: Final = CPU_BASED_CR3_LOAD_EXITING | CPU_BASED_CR3_STORE_EXITING


def set_guest_owned_bits(vcpu: Vcpu) -> None:
    """Which CR0 and CR4 bits the guest changes without an exit (KVM: init_vmcs, set_cr4_guest_host_mask)."""
    ept = vcpu.options.ept
    vcpu.cr0_guest_owned_bits = KVM_POSSIBLE_CR0_GUEST_BITS & ~(0 if ept else crs.X86_CR0_WP)
    owned = KVM_POSSIBLE_CR4_GUEST_BITS & ~vcpu.cpuid.cr4_guest_rsvd_bits
    if not ept:
        owned &= ~(X86_CR4_TLBFLUSH_BITS | X86_CR4_PDPTR_BITS)
    vcpu.cr4_guest_owned_bits = owned
    vcpu.vmcs.write(vf.CR0_GUEST_HOST_MASK, ~vcpu.cr0_guest_owned_bits)
    vcpu.vmcs.write(vf.CR4_GUEST_HOST_MASK, ~owned)


# -- what hardware gets ------------------------------------------------------------------------


def vmx_set_cr0(vcpu: Vcpu, cr0: int) -> None:
    """Store CR0. Hardware keeps NE on and, unless the guest is unrestricted, PE and PG as well."""
    options, vmcs = vcpu.options, vcpu.vmcs
    old_pg = kvm_read_cr0_bits(vcpu, crs.X86_CR0_PG)
    hw_cr0 = cr0 & ~(crs.X86_CR0_NW | crs.X86_CR0_CD) | crs.X86_CR0_NE
    if not options.unrestricted_guest:
        hw_cr0 |= crs.X86_CR0_PG | crs.X86_CR0_PE
        if not options.ept:
            hw_cr0 |= crs.X86_CR0_WP
        if vcpu.rmode.vm86_active and cr0 & crs.X86_CR0_PE:
            enter_pmode(vcpu)
        if not vcpu.rmode.vm86_active and not cr0 & crs.X86_CR0_PE:
            enter_rmode(vcpu)
    vmcs.write(vf.CR0_READ_SHADOW, cr0)
    vmcs.write(vf.GUEST_CR0, hw_cr0)
    vcpu.cr0 = cr0
    kvm_register_mark_available(vcpu, VCPU_EXREG_CR0)
    if vcpu.efer & crs.EFER_LME:
        if not old_pg and cr0 & crs.X86_CR0_PG:
            _enter_lmode(vcpu)
        elif old_pg and not cr0 & crs.X86_CR0_PG:
            vmx_set_efer(vcpu, vcpu.efer & ~crs.EFER_LMA)
    if options.ept and not options.unrestricted_guest:
        _switch_cr3_exiting(vcpu, old_pg, cr0)
    vcpu.emulation_required = vmx_emulation_required(vcpu)


def _switch_cr3_exiting(vcpu: Vcpu, old_pg: int, cr0: int) -> None:
    """EPT without unrestricted guest runs an unpaged guest on KVM's identity map in GUEST_CR3."""
    kvm_read_cr3(vcpu)  # the guest's own value, before interception begins
    if cr0 & crs.X86_CR0_PG:
        vcpu.vmcs.clear_bits(vf.CPU_BASED_VM_EXEC_CONTROL, _CR3_EXITING_BITS)
    else:
        vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, _CR3_EXITING_BITS)
    if (old_pg ^ cr0) & crs.X86_CR0_PG:
        vmx_set_cr4(vcpu, kvm_read_cr4(vcpu))
    if not old_pg and cr0 & crs.X86_CR0_PG:
        kvm_register_mark_dirty(vcpu, VCPU_EXREG_CR3)


def _enter_lmode(vcpu: Vcpu) -> None:
    """Paging was enabled with LME; VM entry wants a busy 64-bit TSS in long mode."""
    vmx_segment_cache_clear(vcpu)
    ar = vcpu.vmcs.read(vf.GUEST_TR_AR_BYTES)
    vcpu.vmcs.write(vf.GUEST_TR_AR_BYTES, ar & ~VMX_AR_TYPE_MASK | VMX_AR_TYPE_BUSY_64_TSS)
    vmx_set_efer(vcpu, vcpu.efer | crs.EFER_LMA)


def vmx_set_efer(vcpu: Vcpu, efer: int) -> None:
    """Store EFER; LMA also goes to the entry controls."""
    vcpu.efer = efer
    if efer & crs.EFER_LMA:
        vcpu.vmcs.set_bits(vf.VM_ENTRY_CONTROLS, VM_ENTRY_IA32E_MODE)
    else:
        vcpu.vmcs.clear_bits(vf.VM_ENTRY_CONTROLS, VM_ENTRY_IA32E_MODE)


def vmx_set_cr4(vcpu: Vcpu, cr4: int) -> None:
    """Store CR4. MCE is the host's, VMXE stays on; UMIP may be emulated by descriptor-table exits."""
    hw_cr4 = cr4 | crs.X86_CR4_MCE | X86_CR4_VMXE
    if not vcpu.options.unrestricted_guest:
        hw_cr4 |= crs.X86_CR4_PAE
        if vcpu.rmode.vm86_active:
            hw_cr4 |= crs.X86_CR4_VME
    if vcpu.options.umip_emulated:
        if cr4 & crs.X86_CR4_UMIP:
            vcpu.vmcs.set_bits(vf.SECONDARY_VM_EXEC_CONTROL, SECONDARY_EXEC_DESC)
            hw_cr4 &= ~crs.X86_CR4_UMIP
        elif vcpu.guest_mode is None or "desc" not in vcpu.guest_mode.intercepts:
            vcpu.vmcs.clear_bits(vf.SECONDARY_VM_EXEC_CONTROL, SECONDARY_EXEC_DESC)
    old_cr4 = kvm_read_cr4(vcpu)
    vcpu.cr4 = cr4
    kvm_register_mark_available(vcpu, VCPU_EXREG_CR4)
    if not vcpu.options.unrestricted_guest:
        hw_cr4 = _restricted_cr4(vcpu, cr4, hw_cr4)
    vcpu.vmcs.write(vf.CR4_READ_SHADOW, cr4)
    vcpu.vmcs.write(vf.GUEST_CR4, hw_cr4)
    if (cr4 ^ old_cr4) & (crs.X86_CR4_OSXSAVE | X86_CR4_PKE):
        kvm_update_cpuid_runtime(vcpu)


def _restricted_cr4(vcpu: Vcpu, cr4: int, hw_cr4: int) -> int:
    """Hardware pages even when the guest does not, so paging features follow the guest's PG."""
    paging = is_paging(vcpu)
    if vcpu.options.ept:
        if not paging:
            hw_cr4 = hw_cr4 & ~crs.X86_CR4_PAE | crs.X86_CR4_PSE
        elif not cr4 & crs.X86_CR4_PAE:
            hw_cr4 &= ~crs.X86_CR4_PAE
    if not paging:
        hw_cr4 &= ~(crs.X86_CR4_SMEP | crs.X86_CR4_SMAP | X86_CR4_PKE)
    return hw_cr4


def kvm_update_cpuid_runtime(vcpu: Vcpu) -> None:
    """CPUID bits that mirror CR4, the APIC base and MISC_ENABLE."""
    vcpu.cpuid.set_runtime("osxsave", on=bool(kvm_read_cr4_bits(vcpu, crs.X86_CR4_OSXSAVE)))
    vcpu.cpuid.set_runtime("ospke", on=bool(kvm_read_cr4_bits(vcpu, X86_CR4_PKE)))
    vcpu.cpuid.set_runtime("apic", on=bool(vcpu.apic_base >> 11 & 1))
    if not vcpu.options.has_quirk("misc_enable_no_mwait"):
        vcpu.cpuid.set_runtime("mwait", on=bool(vcpu.msrs.get(0x1A0, 0) >> 18 & 1))


# -- what the guest may load -------------------------------------------------------------------


def load_pdptrs(vcpu: Vcpu, cr3: int) -> bool:
    """Cache the four PDPTEs at CR3; False if they cannot be read or a reserved bit is set.

    SDM Vol. 3A 4.4.1 "PDPTE Registers".
    """
    data = vcpu.hooks.read_pdptes(cr3 & ~0x1F)
    entries = None if data is None else valid_pdptes(data, vcpu.cpuid.maxphyaddr)
    if entries is None:
        return False
    vcpu.pdptrs[:] = entries
    kvm_register_mark_dirty(vcpu, VCPU_EXREG_PDPTR)
    vcpu.make_request(KVM_REQ_LOAD_MMU_PGD)
    return True


def kvm_is_valid_cr0(cr0: int) -> bool:
    """No bits above 31, no NW without CD, no PG without PE (SDM Vol. 3A 2.5)."""
    if cr0 >> 32 or (cr0 & crs.X86_CR0_NW and not cr0 & crs.X86_CR0_CD):
        return False
    return not cr0 & crs.X86_CR0_PG or bool(cr0 & crs.X86_CR0_PE)


def kvm_set_cr0(vcpu: Vcpu, cr0: int) -> int:
    """MOV to CR0: 0, or 1 for #GP. Reserved bits below 32 are ignored, ET is always 1."""
    old_cr0 = kvm_read_cr0(vcpu)
    if not kvm_is_valid_cr0(cr0):
        return 1
    cr0 = (cr0 | crs.X86_CR0_ET) & CR0_KNOWN
    if cr0 & crs.X86_CR0_PG:
        if vcpu.efer & crs.EFER_LME:
            if not old_cr0 & crs.X86_CR0_PG and (not is_pae(vcpu) or vmx_get_cs_db_l_bits(vcpu)[1]):
                return 1
        elif is_pae(vcpu) and (cr0 ^ old_cr0) & X86_CR0_PDPTR_BITS:
            if not load_pdptrs(vcpu, kvm_read_cr3(vcpu)):
                return 1
    elif is_64_bit_mode(vcpu) or kvm_read_cr4_bits(vcpu, crs.X86_CR4_PCIDE):
        return 1
    vmx_set_cr0(vcpu, cr0)
    _post_set_cr0(vcpu, old_cr0, cr0)
    return 0


def _post_set_cr0(vcpu: Vcpu, old_cr0: int, cr0: int) -> None:
    changed = cr0 ^ old_cr0
    if changed == crs.X86_CR0_WP and not cr0 & crs.X86_CR0_PG:
        return
    if changed & crs.X86_CR0_PG and not cr0 & crs.X86_CR0_PG:
        vcpu.make_request(KVM_REQ_TLB_FLUSH_GUEST)
    if changed & KVM_MMU_CR0_ROLE_BITS:
        vcpu.hooks.mmu_reset_context()


def kvm_lmsw(vcpu: Vcpu, msw: int) -> None:
    """LMSW: bits 3:0, where PE can be set but not cleared; a refused value is ignored."""
    kvm_set_cr0(vcpu, kvm_read_cr0_bits(vcpu, ~0xE) | msw & 0xF)


def kvm_vcpu_is_legal_cr3(vcpu: Vcpu, cr3: int) -> bool:
    """No bits at or above MAXPHYADDR but those of LAM."""
    if vcpu.cpuid.has("lam"):
        cr3 &= ~(X86_CR3_LAM_U48 | X86_CR3_LAM_U57)
    return not cr3 & vcpu.cpuid.reserved_gpa_bits


def kvm_set_cr3(vcpu: Vcpu, cr3: int) -> int:
    """MOV to CR3: 0, or 1 for #GP. With CR4.PCIDE bit 63 only says not to flush."""
    flush, pcid = True, 0
    if kvm_read_cr4_bits(vcpu, crs.X86_CR4_PCIDE):
        flush = not cr3 & X86_CR3_PCID_NOFLUSH
        cr3 &= ~X86_CR3_PCID_NOFLUSH
        pcid = cr3 & X86_CR3_PCID_MASK
    if cr3 != kvm_read_cr3(vcpu) or is_pae_paging(vcpu):
        if not kvm_vcpu_is_legal_cr3(vcpu, cr3):
            return 1
        if is_pae_paging(vcpu) and not load_pdptrs(vcpu, cr3):
            return 1
        if cr3 != kvm_read_cr3(vcpu):
            vcpu.hooks.mmu_new_pgd(cr3)
        vcpu.cr3 = cr3
        kvm_register_mark_dirty(vcpu, VCPU_EXREG_CR3)
    if flush:
        vcpu.hooks.invalidate_pcid(pcid)
    return 0


def kvm_is_valid_cr4(vcpu: Vcpu, cr4: int) -> bool:
    """Only bits of features that the guest's CPUID has; no VMXE within SMM."""
    if cr4 & vcpu.cpuid.cr4_guest_rsvd_bits:
        return False
    return not (cr4 & X86_CR4_VMXE and vcpu.smm)


def kvm_set_cr4(vcpu: Vcpu, cr4: int) -> int:
    """MOV to CR4: 0, or 1 for #GP (SDM Vol. 3A 2.5, 4.10.1 for PCIDE)."""
    old_cr4 = kvm_read_cr4(vcpu)
    changed = cr4 ^ old_cr4
    if not kvm_is_valid_cr4(vcpu, cr4):
        return 1
    if is_long_mode(vcpu):
        if not cr4 & crs.X86_CR4_PAE or changed & crs.X86_CR4_LA57:
            return 1
    elif is_paging(vcpu) and cr4 & crs.X86_CR4_PAE and changed & X86_CR4_PDPTR_BITS:
        if not load_pdptrs(vcpu, kvm_read_cr3(vcpu)):
            return 1
    if cr4 & changed & crs.X86_CR4_PCIDE:
        if kvm_read_cr3(vcpu) & X86_CR3_PCID_MASK or not is_long_mode(vcpu):
            return 1
    vmx_set_cr4(vcpu, cr4)
    _post_set_cr4(vcpu, old_cr4, cr4)
    return 0


def _post_set_cr4(vcpu: Vcpu, old_cr4: int, cr4: int) -> None:
    changed = cr4 ^ old_cr4
    if changed & KVM_MMU_CR4_ROLE_BITS:
        vcpu.hooks.mmu_reset_context()
    if changed & crs.X86_CR4_PGE or old_cr4 & ~cr4 & crs.X86_CR4_PCIDE:
        vcpu.make_request(KVM_REQ_TLB_FLUSH_GUEST)
    elif changed & crs.X86_CR4_PAE or cr4 & ~old_cr4 & crs.X86_CR4_SMEP:
        vcpu.make_request(KVM_REQ_TLB_FLUSH_CURRENT)


def kvm_set_cr8(vcpu: Vcpu, cr8: int) -> int:
    """MOV to CR8: 0, or 1 for #GP above 15. An in-kernel APIC keeps it in its TPR."""
    if cr8 >> 4:
        return 1
    if vcpu.apic is not None:
        kvm_lapic_set_tpr(vcpu, cr8)
    else:
        vcpu.cr8 = cr8
    return 0


def kvm_get_cr8(vcpu: Vcpu) -> int:
    """CR8, the task priority."""
    return vcpu.cr8 if vcpu.apic is None else kvm_lapic_get_cr8(vcpu)
