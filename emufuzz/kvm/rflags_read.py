"""RFLAGS as the VMCS has it, and the vm86 stand-in's own bits of it (KVM: vmx_get_rflags)."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.rflags import X86_EFLAGS_IF, X86_EFLAGS_IOPL, X86_EFLAGS_VM
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.vcpu import VCPU_EXREG_RFLAGS, Vcpu

#: In the vm86 stand-in for real mode IOPL and VM are KVM's, all other flags the guest's.
RMODE_GUEST_OWNED_EFLAGS_BITS: Final = ~(X86_EFLAGS_IOPL | X86_EFLAGS_VM) & (1 << 64) - 1
_RFLAGS: Final = 1 << VCPU_EXREG_RFLAGS


def merge_rmode_rflags(vcpu: Vcpu, rflags: int) -> int:
    """The guest's flags, from hardware's and from those saved at the entry to the stand-in."""
    guest = RMODE_GUEST_OWNED_EFLAGS_BITS
    return rflags & guest | vcpu.rmode.save_rflags & ~guest


def vmx_get_rflags(vcpu: Vcpu) -> int:
    """The guest's RFLAGS, TF of a debugging userspace included."""
    if not vcpu.regs_avail & _RFLAGS:
        vcpu.regs_avail |= _RFLAGS
        rflags = vcpu.vmcs.values[vf.GUEST_RFLAGS]
        vcpu.rflags = merge_rmode_rflags(vcpu, rflags) if vcpu.rmode.vm86_active else rflags
    return vcpu.rflags


def vmx_get_if_flag(vcpu: Vcpu) -> bool:
    """RFLAGS.IF."""
    return bool(vmx_get_rflags(vcpu) & X86_EFLAGS_IF)
