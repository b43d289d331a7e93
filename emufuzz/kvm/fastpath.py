"""WRMSR handled right after the VM exit, before KVM looks at anything else.

KVM: handle_fastpath_set_msr_irqoff, handle_fastpath_set_x2apic_icr_irqoff,
handle_fastpath_set_tscdeadline.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RCX
from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.lapic import kvm_x2apic_icr_write
from emufuzz.kvm.lapic_irq import apic_x2apic_mode, emit
from emufuzz.kvm.lapic_timer import kvm_set_lapic_tscdeadline_msr
from emufuzz.kvm.msr_index import APIC_BASE_MSR, MSR_IA32_TSC_DEADLINE
from emufuzz.kvm.regs import kvm_read_edx_eax
from emufuzz.kvm.vcpu import Vcpu

#: What becomes of the exit: the usual handler, a new entry at once, one by way of the slow path, or
#: KVM_RUN returns.
EXIT_FASTPATH_NONE: Final = "NONE"
EXIT_FASTPATH_REENTER_GUEST: Final = "REENTER_GUEST"
EXIT_FASTPATH_EXIT_HANDLED: Final = "EXIT_HANDLED"
EXIT_FASTPATH_EXIT_USERSPACE: Final = "EXIT_USERSPACE"

_X2APIC_ICR: Final = APIC_BASE_MSR + (r.APIC_ICR >> 4)
_MASK32: Final = 0xFFFFFFFF


def handle_fastpath_set_msr_irqoff(vcpu: Vcpu) -> str:
    """WRMSR exited: EXIT_FASTPATH_*.

    KVM deviation: userspace's filter of MSRs is not asked about IA32_TSC_DEADLINE here, and with an APIC
    that is disabled or in another mode the write is ignored (SDM Vol. 3A 10.5.4.1).
    """
    msr, data = vcpu.regs[VCPU_REGS_RCX] & _MASK32, kvm_read_edx_eax(vcpu)
    if msr == _X2APIC_ICR:
        handled = _set_x2apic_icr(vcpu, data)
    elif msr == MSR_IA32_TSC_DEADLINE:
        handled = _set_tscdeadline(vcpu, data)
    else:
        handled = False
    if not handled:
        return EXIT_FASTPATH_NONE
    vcpu.msrs_written.add(msr)
    goes_on = kvm_skip_emulated_instruction(vcpu)
    emit(vcpu, "kvm_msr", write=1, ecx=msr, data=data, exception=0)
    return EXIT_FASTPATH_REENTER_GUEST if goes_on else EXIT_FASTPATH_EXIT_USERSPACE


def _set_x2apic_icr(vcpu: Vcpu, data: int) -> bool:
    """A fixed IPI to one physical ID, without shorthand; what is refused is left to the usual handler."""
    if vcpu.apic is None or not apic_x2apic_mode(vcpu):
        return False
    if data & (r.APIC_SHORT_MASK | r.APIC_DEST_MASK | r.APIC_MODE_MASK) or data >> 32 == r.X2APIC_BROADCAST:
        return False
    return not kvm_x2apic_icr_write(vcpu, data)


def _set_tscdeadline(vcpu: Vcpu, data: int) -> bool:
    """Only with the VMX-preemption timer, which a guest that may use MWAIT does not get.

    With APICv a guest that may halt without exiting has its timer interrupts posted instead, where the
    module parameter pi_inject_timer is on; it is off by default.
    """
    if vcpu.options.mwait_in_guest:
        return False
    kvm_set_lapic_tscdeadline_msr(vcpu, data)
    return True
