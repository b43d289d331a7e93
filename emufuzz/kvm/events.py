"""What wakes a halted vCPU (KVM: kvm_vcpu_has_events, kvm_cpu_has_interrupt)."""

from __future__ import annotations

from emufuzz.kvm.exceptions import kvm_is_exception_pending
from emufuzz.kvm.inject import vmx_interrupt_blocked, vmx_nmi_blocked
from emufuzz.kvm.lapic_irq import kvm_apic_has_interrupt
from emufuzz.kvm.vcpu import KVM_REQ_NMI, KVM_REQ_SMI, Vcpu


def kvm_vcpu_has_events(vcpu: Vcpu) -> bool:
    """A kick by hypercall, INIT or SIPI, an exception, or an SMI, NMI or interrupt that can be taken now."""
    apic = vcpu.apic
    if apic is not None and (apic.pv_unhalted or apic.pending_events):
        return True
    if kvm_is_exception_pending(vcpu):
        return True
    if (vcpu.nmi_pending or KVM_REQ_NMI in vcpu.requests) and not vmx_nmi_blocked(vcpu):
        return True
    if KVM_REQ_SMI in vcpu.requests or (vcpu.smi_pending and not vcpu.smm):
        return True
    return kvm_cpu_has_interrupt(vcpu) and not vmx_interrupt_blocked(vcpu)


def kvm_cpu_has_interrupt(vcpu: Vcpu) -> bool:
    """The in-kernel APIC has one above the task priority."""
    return kvm_apic_has_interrupt(vcpu) >= 0
