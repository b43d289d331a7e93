"""The register cache: which registers are in the vCPU and which are still in the VMCS.

KVM: kvm_cache_regs.h, vmx_cache_reg, ept_save_pdptrs, vmx_get_exit_qual, vmx_get_intr_info,
VMX_REGS_LAZY_LOAD_SET. A clear bit of `regs_avail` means that the value is in the VMCS; a bit of
`regs_dirty` means that the VMCS gets it at the next entry.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RDX, VCPU_REGS_RSP
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.vcpu import (
    VCPU_EXREG_CR0,
    VCPU_EXREG_CR3,
    VCPU_EXREG_CR4,
    VCPU_EXREG_EXIT_INFO_1,
    VCPU_EXREG_EXIT_INFO_2,
    VCPU_EXREG_PDPTR,
    VCPU_EXREG_RFLAGS,
    VCPU_EXREG_SEGMENTS,
    VCPU_REGS_RIP,
    Vcpu,
)
from emufuzz.kvm.vmx_bits import CPU_BASED_CR3_LOAD_EXITING

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1

#: CR0 and CR4 bits that the guest may own, that is change without an exit.
KVM_POSSIBLE_CR0_GUEST_BITS: Final = crs.X86_CR0_TS | crs.X86_CR0_WP
KVM_POSSIBLE_CR4_GUEST_BITS: Final = (
    crs.X86_CR4_PVI | crs.X86_CR4_DE | crs.X86_CR4_PCE | crs.X86_CR4_OSFXSR | crs.X86_CR4_OSXMMEXCPT
    | crs.X86_CR4_PGE | crs.X86_CR4_TSD | crs.X86_CR4_FSGSBASE
)  # fmt: skip

_AVAIL: Final = [1 << reg for reg in range(25)]
_CR0: Final = 1 << VCPU_EXREG_CR0
_CR3: Final = 1 << VCPU_EXREG_CR3
_CR4: Final = 1 << VCPU_EXREG_CR4
_INFO_1: Final = 1 << VCPU_EXREG_EXIT_INFO_1
_INFO_2: Final = 1 << VCPU_EXREG_EXIT_INFO_2
_PDPTR: Final = 1 << VCPU_EXREG_PDPTR

#: What a VM exit leaves in the VMCS until somebody asks.
VMX_REGS_LAZY_LOAD_SET: Final = (
    1 << VCPU_REGS_RIP
    | 1 << VCPU_REGS_RSP
    | 1 << VCPU_EXREG_RFLAGS
    | _PDPTR
    | 1 << VCPU_EXREG_SEGMENTS
    | _CR0
    | _CR3
    | _CR4
    | _INFO_1
    | _INFO_2
)

_PDPTR_FIELDS: Final = (vf.GUEST_PDPTR0, vf.GUEST_PDPTR1, vf.GUEST_PDPTR2, vf.GUEST_PDPTR3)


def kvm_register_is_available(vcpu: Vcpu, reg: int) -> bool:
    """The vCPU's copy is up to date."""
    return bool(vcpu.regs_avail >> reg & 1)


def kvm_register_is_dirty(vcpu: Vcpu, reg: int) -> bool:
    """The VMCS is to get the vCPU's copy at the next entry."""
    return bool(vcpu.regs_dirty >> reg & 1)


def kvm_register_mark_available(vcpu: Vcpu, reg: int) -> None:
    """The vCPU's copy is up to date from now on."""
    vcpu.regs_avail |= _AVAIL[reg]


def kvm_register_mark_dirty(vcpu: Vcpu, reg: int) -> None:
    """The vCPU's copy is the newer one."""
    vcpu.regs_avail |= _AVAIL[reg]
    vcpu.regs_dirty |= _AVAIL[reg]


def vmx_cache_reg(vcpu: Vcpu, reg: int) -> None:
    """Load one lazily cached register from the VMCS."""
    vcpu.regs_avail |= _AVAIL[reg]
    values = vcpu.vmcs.values
    if reg == VCPU_REGS_RIP:
        vcpu.regs[reg] = values[vf.GUEST_RIP]
    elif reg == VCPU_REGS_RSP:
        vcpu.regs[reg] = values[vf.GUEST_RSP]
    elif reg == VCPU_EXREG_CR0:
        owned = vcpu.cr0_guest_owned_bits
        vcpu.cr0 = vcpu.cr0 & ~owned | values[vf.GUEST_CR0] & owned
    elif reg == VCPU_EXREG_CR3:
        if not values[vf.CPU_BASED_VM_EXEC_CONTROL] & CPU_BASED_CR3_LOAD_EXITING:
            vcpu.cr3 = values[vf.GUEST_CR3]
    elif reg == VCPU_EXREG_CR4:
        owned = vcpu.cr4_guest_owned_bits
        vcpu.cr4 = vcpu.cr4 & ~owned | values[vf.GUEST_CR4] & owned
    elif reg == VCPU_EXREG_PDPTR:
        if vcpu.options.ept and is_pae_paging(vcpu):
            vcpu.pdptrs[:] = [values[field] for field in _PDPTR_FIELDS]
    else:
        raise ValueError(f"register {reg} is not cached by vmx_cache_reg")


def kvm_register_read_raw(vcpu: Vcpu, reg: int) -> int:
    """All 64 bits of a GPR (0..15) or RIP (16)."""
    if not vcpu.regs_avail >> reg & 1:
        vmx_cache_reg(vcpu, reg)
    return vcpu.regs[reg]


def kvm_register_write_raw(vcpu: Vcpu, reg: int, val: int) -> None:
    """Store 64 bits into a GPR or RIP."""
    vcpu.regs[reg] = val & _MASK64
    vcpu.regs_avail |= _AVAIL[reg]
    vcpu.regs_dirty |= _AVAIL[reg]


def kvm_rip_read(vcpu: Vcpu) -> int:
    """RIP."""
    return kvm_register_read_raw(vcpu, VCPU_REGS_RIP)


def kvm_rip_write(vcpu: Vcpu, val: int) -> None:
    """Store RIP."""
    kvm_register_write_raw(vcpu, VCPU_REGS_RIP, val)


def kvm_rsp_read(vcpu: Vcpu) -> int:
    """RSP."""
    return kvm_register_read_raw(vcpu, VCPU_REGS_RSP)


def kvm_rsp_write(vcpu: Vcpu, val: int) -> None:
    """Store RSP."""
    kvm_register_write_raw(vcpu, VCPU_REGS_RSP, val)


def kvm_read_edx_eax(vcpu: Vcpu) -> int:
    """EDX:EAX, the operand of WRMSR and XSETBV."""
    return vcpu.regs[VCPU_REGS_RAX] & _MASK32 | (vcpu.regs[VCPU_REGS_RDX] & _MASK32) << 32


def kvm_read_cr0(vcpu: Vcpu) -> int:
    """The guest's CR0."""
    if not vcpu.regs_avail & _CR0:
        vmx_cache_reg(vcpu, VCPU_EXREG_CR0)
    return vcpu.cr0


def kvm_read_cr0_bits(vcpu: Vcpu, mask: int) -> int:
    """Some bits of CR0; the VMCS is asked only for bits that the guest owns."""
    if not vcpu.regs_avail & _CR0 and mask & vcpu.cr0_guest_owned_bits:
        vmx_cache_reg(vcpu, VCPU_EXREG_CR0)
    return vcpu.cr0 & mask


def kvm_read_cr3(vcpu: Vcpu) -> int:
    """The guest's CR3."""
    if not vcpu.regs_avail & _CR3:
        vmx_cache_reg(vcpu, VCPU_EXREG_CR3)
    return vcpu.cr3


def kvm_read_cr4(vcpu: Vcpu) -> int:
    """The guest's CR4."""
    if not vcpu.regs_avail & _CR4:
        vmx_cache_reg(vcpu, VCPU_EXREG_CR4)
    return vcpu.cr4


def kvm_read_cr4_bits(vcpu: Vcpu, mask: int) -> int:
    """Some bits of CR4; the VMCS is asked only for bits that the guest owns."""
    if not vcpu.regs_avail & _CR4 and mask & vcpu.cr4_guest_owned_bits:
        vmx_cache_reg(vcpu, VCPU_EXREG_CR4)
    return vcpu.cr4 & mask


def kvm_pdptr_read(vcpu: Vcpu, index: int) -> int:
    """One of the four cached PDPTEs (SDM Vol. 3A 4.4.1)."""
    if not vcpu.regs_avail & _PDPTR:
        vmx_cache_reg(vcpu, VCPU_EXREG_PDPTR)
    return vcpu.pdptrs[index]


def vmx_get_exit_qual(vcpu: Vcpu) -> int:
    """The exit qualification of the last VM exit."""
    if not vcpu.regs_avail & _INFO_1:
        vcpu.regs_avail |= _INFO_1
        vcpu.exit_info_1 = vcpu.vmcs.values[vf.EXIT_QUALIFICATION]
    return vcpu.exit_info_1


def vmx_get_intr_info(vcpu: Vcpu) -> int:
    """The interruption information of the last VM exit."""
    if not vcpu.regs_avail & _INFO_2:
        vcpu.regs_avail |= _INFO_2
        vcpu.exit_info_2 = vcpu.vmcs.values[vf.VM_EXIT_INTR_INFO]
    return vcpu.exit_info_2


def is_protmode(vcpu: Vcpu) -> bool:
    """CR0.PE."""
    return bool(kvm_read_cr0_bits(vcpu, crs.X86_CR0_PE))


def is_paging(vcpu: Vcpu) -> bool:
    """CR0.PG."""
    return bool(kvm_read_cr0_bits(vcpu, crs.X86_CR0_PG))


def is_long_mode(vcpu: Vcpu) -> bool:
    """EFER.LMA: 64-bit or compatibility mode."""
    return bool(vcpu.efer & crs.EFER_LMA)


def is_pae(vcpu: Vcpu) -> bool:
    """CR4.PAE."""
    return bool(kvm_read_cr4_bits(vcpu, crs.X86_CR4_PAE))


def is_pae_paging(vcpu: Vcpu) -> bool:
    """PAE paging outside long mode, with cached PDPTEs."""
    return not is_long_mode(vcpu) and is_pae(vcpu) and is_paging(vcpu)


def vmx_after_exit(vcpu: Vcpu) -> None:
    """A VM exit happened: the lazily cached registers are in the VMCS (KVM: vmx_vcpu_run, its end)."""
    vcpu.regs_avail &= ~VMX_REGS_LAZY_LOAD_SET
    vcpu.regs_dirty = 0


def vmx_before_entry(vcpu: Vcpu) -> None:
    """Store RIP, RSP, CR3 and PDPTEs where dirty (KVM: vmx_vcpu_run, vmx_load_mmu_pgd)."""
    vmcs, dirty = vcpu.vmcs, vcpu.regs_dirty
    if dirty >> VCPU_REGS_RSP & 1:
        vmcs.write(vf.GUEST_RSP, vcpu.regs[VCPU_REGS_RSP])
    if dirty >> VCPU_REGS_RIP & 1:
        vmcs.write(vf.GUEST_RIP, vcpu.regs[VCPU_REGS_RIP])
    if vcpu.options.ept:
        _load_mmu_pgd(vcpu)
    vcpu.regs_dirty = 0


def _load_mmu_pgd(vcpu: Vcpu) -> None:
    """EPT only: with shadow paging GUEST_CR3 is a host address, which the model does not have."""
    if not vcpu.options.unrestricted_guest and not is_paging(vcpu):
        vcpu.vmcs.write(vf.GUEST_CR3, vcpu.options.ept_identity_map_addr)
    elif vcpu.regs_dirty & _CR3:
        vcpu.vmcs.write(vf.GUEST_CR3, vcpu.cr3)
    if vcpu.regs_dirty & _PDPTR and is_pae_paging(vcpu):
        for field, value in zip(_PDPTR_FIELDS, vcpu.pdptrs, strict=True):
            vcpu.vmcs.write(field, value)
