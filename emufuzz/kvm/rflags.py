"""RFLAGS and linear RIP as the guest and userspace see them.

KVM: vmx_set_rflags, kvm_get_rflags, __kvm_set_rflags, kvm_set_rflags, kvm_get_linear_rip.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.arch.rflags import X86_EFLAGS_IOPL, X86_EFLAGS_TF, X86_EFLAGS_VM
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.guest_state import vmx_emulation_required
from emufuzz.kvm.regs import kvm_register_mark_available, kvm_rip_read
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import get_segment_base, is_64_bit_mode
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, VCPU_EXREG_RFLAGS, Vcpu, is_unrestricted_guest

#: KVM_SET_GUEST_DEBUG: control bits.
KVM_GUESTDBG_ENABLE: Final = 1 << 0
KVM_GUESTDBG_SINGLESTEP: Final = 1 << 1
KVM_GUESTDBG_USE_SW_BP: Final = 1 << 16
KVM_GUESTDBG_USE_HW_BP: Final = 1 << 17
KVM_GUESTDBG_INJECT_DB: Final = 1 << 18
KVM_GUESTDBG_INJECT_BP: Final = 1 << 19
KVM_GUESTDBG_BLOCKIRQ: Final = 1 << 20

_MASK32: Final = 0xFFFFFFFF


def vmx_set_rflags(vcpu: Vcpu, rflags: int) -> None:
    """Store RFLAGS, at once; a change of VM decides anew whether the guest can be entered."""
    if is_unrestricted_guest(vcpu):
        kvm_register_mark_available(vcpu, VCPU_EXREG_RFLAGS)
        vcpu.rflags = rflags
        vcpu.vmcs.write(vf.GUEST_RFLAGS, rflags)
        return
    old_rflags = vmx_get_rflags(vcpu)
    vcpu.rflags = rflags
    hardware = rflags
    if vcpu.rmode.vm86_active:
        vcpu.rmode.save_rflags = rflags
        hardware |= X86_EFLAGS_IOPL | X86_EFLAGS_VM
    vcpu.vmcs.write(vf.GUEST_RFLAGS, hardware)
    if (old_rflags ^ rflags) & X86_EFLAGS_VM:
        vcpu.emulation_required = vmx_emulation_required(vcpu)


def kvm_get_rflags(vcpu: Vcpu) -> int:
    """RFLAGS without the TF that single-stepping userspace has put there."""
    rflags = vmx_get_rflags(vcpu)
    if vcpu.guest_debug & KVM_GUESTDBG_SINGLESTEP:
        rflags &= ~X86_EFLAGS_TF
    return rflags


def set_rflags_no_event(vcpu: Vcpu, rflags: int) -> None:
    """Store RFLAGS, with userspace's TF if RIP is where stepping began (KVM: __kvm_set_rflags)."""
    if vcpu.guest_debug & KVM_GUESTDBG_SINGLESTEP and kvm_is_linear_rip(vcpu, vcpu.singlestep_rip):
        rflags |= X86_EFLAGS_TF
    vmx_set_rflags(vcpu, rflags)


def kvm_set_rflags(vcpu: Vcpu, rflags: int) -> None:
    """Store RFLAGS and have pending events looked at again, as IF may have changed."""
    set_rflags_no_event(vcpu, rflags)
    vcpu.make_request(KVM_REQ_EVENT)


def kvm_get_linear_rip(vcpu: Vcpu) -> int:
    """The linear address of the next instruction."""
    if is_64_bit_mode(vcpu):
        return kvm_rip_read(vcpu)
    return get_segment_base(vcpu, VCPU_SREG_CS) + kvm_rip_read(vcpu) & _MASK32


def kvm_is_linear_rip(vcpu: Vcpu, linear_rip: int) -> bool:
    """The next instruction is at this linear address."""
    return kvm_get_linear_rip(vcpu) == linear_rip
