"""Interrupt shadows, and going on to the next instruction without emulating this one.

KVM: vmx_get_interrupt_shadow, vmx_set_interrupt_shadow, toggle_interruptibility,
skip_emulated_instruction, vmx_skip_emulated_instruction, kvm_skip_emulated_instruction,
vmx_update_emulated_instruction. SDM Vol. 3C 24.4.2 "Guest Non-Register State".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import DB_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.debugregs import kvm_vcpu_do_singlestep
from emufuzz.kvm.exit_reasons import EXIT_REASON_EPT_MISCONFIG
from emufuzz.kvm.regs import kvm_rip_read, kvm_rip_write
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import is_64_bit_mode
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, Vcpu
from emufuzz.kvm.vmx_bits import GUEST_INTR_STATE_MOV_SS, GUEST_INTR_STATE_STI

KVM_X86_SHADOW_INT_MOV_SS: Final = 1
KVM_X86_SHADOW_INT_STI: Final = 2

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_BOTH: Final = GUEST_INTR_STATE_STI | GUEST_INTR_STATE_MOV_SS


def vmx_get_interrupt_shadow(vcpu: Vcpu) -> int:
    """KVM_X86_SHADOW_INT_* of the last instruction."""
    state = vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO]
    shadow = KVM_X86_SHADOW_INT_STI if state & GUEST_INTR_STATE_STI else 0
    return shadow | (KVM_X86_SHADOW_INT_MOV_SS if state & GUEST_INTR_STATE_MOV_SS else 0)


def vmx_set_interrupt_shadow(vcpu: Vcpu, mask: int) -> None:
    """Store a shadow; hardware allows only one of the two, and MOV SS wins."""
    state = vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & ~_BOTH
    if mask & KVM_X86_SHADOW_INT_MOV_SS:
        state |= GUEST_INTR_STATE_MOV_SS
    elif mask & KVM_X86_SHADOW_INT_STI:
        state |= GUEST_INTR_STATE_STI
    vcpu.vmcs.write(vf.GUEST_INTERRUPTIBILITY_INFO, state)


def toggle_interruptibility(vcpu: Vcpu, mask: int) -> None:
    """After an emulated instruction that asked for the shadow `mask`.

    A shadow of the same kind that is already there is not renewed, so STI; STI lets an interrupt in
    after the second.
    """
    shadow = vmx_get_interrupt_shadow(vcpu)
    if shadow & mask:
        mask = 0
    if shadow or mask:
        vmx_set_interrupt_shadow(vcpu, mask)
        if not mask:
            vcpu.make_request(KVM_REQ_EVENT)


def skip_emulated_instruction(vcpu: Vcpu) -> int:
    """Move RIP past the instruction that exited, by the length that hardware reported.

    A length of 0 moves nothing. RIP is cut to 32 bits only if the addition carried out of bit 31
    outside 64-bit mode. Hyper-V does not report a length for an EPT misconfiguration, so KVM on a
    hypervisor decodes the instruction in that case; 0 means that this failed.
    """
    if vcpu.options.host_hypervisor and vcpu.exit_reason & 0xFFFF == EXIT_REASON_EPT_MISCONFIG:
        if not vcpu.hooks.emulate_skip():
            return 0
    else:
        length = vcpu.vmcs.values[vf.VM_EXIT_INSTRUCTION_LEN]
        if length:
            old = kvm_rip_read(vcpu)
            rip = old + length & _MASK64
            if (rip ^ old) >> 31 == 3 and not is_64_bit_mode(vcpu):
                rip &= _MASK32
            kvm_rip_write(vcpu, rip)
    vmx_set_interrupt_shadow(vcpu, 0)
    return 1


def vmx_update_emulated_instruction(vcpu: Vcpu) -> None:
    """Note that L1 is owed a monitor-trap exit after this instruction of L2 (SDM Vol. 3C 25.5.2)."""
    if vcpu.guest_mode is None:
        return
    outranked = any(
        queued.pending and queued.vector != DB_VECTOR for queued in (vcpu.exception, vcpu.exception_vmexit)
    )
    vcpu.mtf_pending = vcpu.guest_mode.mtf and not outranked
    if vcpu.mtf_pending:
        vcpu.make_request(KVM_REQ_EVENT)


def vmx_skip_emulated_instruction(vcpu: Vcpu) -> int:
    """Skip, for VMX: the nested monitor trap is decided first."""
    vmx_update_emulated_instruction(vcpu)
    return skip_emulated_instruction(vcpu)


def kvm_skip_emulated_instruction(vcpu: Vcpu) -> int:
    """Skip an instruction that a handler has carried out, single step included; 0 leaves for userspace.

    TF is the one before the instruction, userspace's included.
    """
    rflags = vmx_get_rflags(vcpu)
    if not vmx_skip_emulated_instruction(vcpu):
        return 0
    if rflags & X86_EFLAGS_TF:
        return kvm_vcpu_do_singlestep(vcpu)
    return 1
