"""Interrupts within the local APIC: acceptance, priorities, EOI, and their hand-over to the vCPU.

KVM: __apic_accept_irq, kvm_apic_set_irq, __apic_update_ppr, apic_set_tpr, apic_set_eoi,
kvm_apic_has_interrupt, kvm_apic_ack_interrupt, kvm_cpu_has_injectable_intr, kvm_cpu_get_interrupt,
kvm_lapic_update_cr8_intercept. SDM Vol. 3A 10.8 "Handling Interrupts".

The I/O APIC and the PIC have no interrupts of their own here, so an EOI ends with the local APIC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exceptions import kvm_inject_nmi
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, KVM_REQ_SMI, Vcpu

if TYPE_CHECKING:
    from emufuzz.kvm.lapic import LocalApic

#: A system-management interrupt arrived; nothing of the model takes this request.

INIT: Final = "INIT"
SIPI: Final = "SIPI"


def apic_of(vcpu: Vcpu) -> LocalApic:
    """The vCPU's local APIC; ValueError for a vCPU that has none."""
    if vcpu.apic is None:
        raise ValueError("the vCPU has no in-kernel local APIC")
    return vcpu.apic


def emit(vcpu: Vcpu, name: str, **fields: Any) -> None:
    """Trace an event, if anybody listens."""
    if vcpu.trace is not None:
        vcpu.trace.emit(name, **fields)


def kvm_apic_hw_enabled(vcpu: Vcpu) -> bool:
    """IA32_APIC_BASE enables the APIC."""
    return bool(vcpu.apic_base & r.MSR_IA32_APICBASE_ENABLE)


def apic_x2apic_mode(vcpu: Vcpu) -> bool:
    """IA32_APIC_BASE selects x2APIC mode."""
    return bool(vcpu.apic_base & r.X2APIC_ENABLE)


def kvm_apic_present(vcpu: Vcpu) -> bool:
    """There is a local APIC in the kernel, and the guest has it enabled."""
    return vcpu.apic is not None and kvm_apic_hw_enabled(vcpu)


def kvm_lapic_enabled(vcpu: Vcpu) -> bool:
    """Present, and enabled in the spurious-interrupt vector register too."""
    return vcpu.apic is not None and kvm_apic_hw_enabled(vcpu) and vcpu.apic.sw_enabled


def kvm_vcpu_apicv_active(vcpu: Vcpu) -> bool:
    """Hardware delivers the APIC's interrupts by itself."""
    return vcpu.apic is not None and vcpu.options.enable_apicv


# -- acceptance --------------------------------------------------------------------------------


def kvm_apic_set_irq(vcpu: Vcpu, delivery_mode: int, vector: int, *, level: bool, trig_mode: bool) -> int:
    """An interrupt message reaches this APIC: 1 if it is accepted, 0 if it is dropped.

    Args:
        vcpu: the target.
        delivery_mode: APIC_DM_*.
        vector: 0..255.
        level: assert, for level-triggered messages.
        trig_mode: level-triggered.

    KVM deviation: a fixed interrupt with vector 0..15 sets its IRR bit instead of an error in ESR; it is
    never delivered (SDM Vol. 3A 10.5.2).
    """
    emit(vcpu, "kvm_apic_accept_irq", apicid=0, dm=delivery_mode, tm=int(trig_mode), vec=vector)
    apic = apic_of(vcpu)
    if delivery_mode in (r.APIC_DM_FIXED, r.APIC_DM_LOWEST):
        return _accept_fixed(vcpu, vector, level=level, trig_mode=trig_mode)
    if delivery_mode == r.APIC_DM_REMRD:
        apic.pv_unhalted = True
    elif delivery_mode == r.APIC_DM_SMI:
        vcpu.make_request(KVM_REQ_SMI)
        return 1
    elif delivery_mode == r.APIC_DM_NMI:
        kvm_inject_nmi(vcpu)
        return 1
    elif delivery_mode == r.APIC_DM_INIT:
        if trig_mode and not level:
            return 0
        apic.pending_events = {INIT}
    elif delivery_mode == r.APIC_DM_STARTUP:
        apic.sipi_vector = vector
        apic.pending_events.add(SIPI)
    else:  # ExtINT
        return 0
    vcpu.make_request(KVM_REQ_EVENT)
    return 1


def _accept_fixed(vcpu: Vcpu, vector: int, *, level: bool, trig_mode: bool) -> int:
    apic = apic_of(vcpu)
    if (trig_mode and not level) or not kvm_lapic_enabled(vcpu):
        return 0
    if trig_mode:
        apic.set_vector(vector, r.APIC_TMR)
    else:
        apic.clear_vector(vector, r.APIC_TMR)
    apic.set_vector(vector, r.APIC_IRR)
    if not kvm_vcpu_apicv_active(vcpu):
        vcpu.make_request(KVM_REQ_EVENT)
    return 1


# -- priorities --------------------------------------------------------------------------------


def _processor_priority(apic: LocalApic) -> int:
    """TPR or the class of the highest vector in service, whichever is higher (SDM Vol. 3A 10.8.3.1)."""
    tpr = apic.get_reg(r.APIC_TASKPRI)
    in_service = max(apic.find_highest_vector(r.APIC_ISR), 0)
    return tpr & 0xFF if tpr & 0xF0 >= in_service & 0xF0 else in_service & 0xF0


def _has_interrupt_for_ppr(apic: LocalApic, ppr: int) -> int:
    highest = apic.find_highest_vector(r.APIC_IRR)
    return -1 if highest == -1 or highest & 0xF0 <= ppr else highest


def kvm_apic_update_ppr(vcpu: Vcpu) -> None:
    """Compute PPR; if it fell below a pending interrupt, have events looked at."""
    apic = apic_of(vcpu)
    old, new = apic.get_reg(r.APIC_PROCPRI), _processor_priority(apic)
    apic.set_reg(r.APIC_PROCPRI, new)
    if new < old and _has_interrupt_for_ppr(apic, new) != -1:
        vcpu.make_request(KVM_REQ_EVENT)
    else:
        kvm_lapic_update_cr8_intercept(vcpu)


def kvm_lapic_update_cr8_intercept(vcpu: Vcpu) -> None:
    """Tell hardware at which TPR a pending interrupt becomes deliverable (SDM Vol. 3C 24.6.8).

    While L2 runs the threshold of L1 is put off, which the model does not keep.
    """
    if vcpu.apic is None or kvm_vcpu_apicv_active(vcpu) or vcpu.guest_mode is not None:
        return
    highest = vcpu.apic.find_highest_vector(r.APIC_IRR)
    wanted = highest >> 4 if highest != -1 else -1
    vcpu.vmcs.write(vf.TPR_THRESHOLD, 0 if wanted == -1 or kvm_lapic_get_cr8(vcpu) < wanted else wanted)


def apic_set_tpr(vcpu: Vcpu, tpr: int) -> None:
    """Store the task priority, 8 bits."""
    apic_of(vcpu).set_reg(r.APIC_TASKPRI, tpr)
    kvm_apic_update_ppr(vcpu)


def kvm_lapic_set_tpr(vcpu: Vcpu, cr8: int) -> None:
    """CR8 is the priority class of TPR (SDM Vol. 3A 10.8.6.1)."""
    apic_set_tpr(vcpu, (cr8 & 0xF) << 4)


def kvm_lapic_get_cr8(vcpu: Vcpu) -> int:
    """CR8, from TPR."""
    return apic_of(vcpu).get_reg(r.APIC_TASKPRI) >> 4 & 0xF


# -- service -----------------------------------------------------------------------------------


def apic_set_eoi(vcpu: Vcpu) -> int:
    """The highest interrupt in service ends: its vector, -1 if there is none."""
    apic = apic_of(vcpu)
    vector = apic.find_highest_vector(r.APIC_ISR)
    emit(vcpu, "kvm_eoi", apicid=0, vector=vector)
    if vector == -1:
        return vector
    apic.clear_vector(vector, r.APIC_ISR)
    kvm_apic_update_ppr(vcpu)
    vcpu.make_request(KVM_REQ_EVENT)
    return vector


def kvm_apic_set_eoi_accelerated(vcpu: Vcpu, vector: int) -> None:
    """Hardware has done an EOI and exits to say which (SDM Vol. 3C 29.1.4)."""
    emit(vcpu, "kvm_eoi", apicid=0, vector=vector)
    vcpu.make_request(KVM_REQ_EVENT)


def kvm_apic_has_interrupt(vcpu: Vcpu) -> int:
    """The vector that could be delivered now, -1 if there is none."""
    if not kvm_apic_present(vcpu):
        return -1
    apic = apic_of(vcpu)
    ppr = _processor_priority(apic)
    apic.set_reg(r.APIC_PROCPRI, ppr)
    return _has_interrupt_for_ppr(apic, ppr)


def kvm_apic_ack_interrupt(vcpu: Vcpu, vector: int) -> None:
    """An interrupt goes from IRR to ISR."""
    apic = apic_of(vcpu)
    apic.clear_vector(vector, r.APIC_IRR)
    apic.set_vector(vector, r.APIC_ISR)
    apic.set_reg(r.APIC_PROCPRI, _processor_priority(apic))


def kvm_cpu_has_injectable_intr(vcpu: Vcpu) -> bool:
    """KVM has an interrupt to inject.

    KVM deviation: without an in-kernel APIC this is an interrupt that is being injected already.
    """
    if vcpu.apic is None:
        return vcpu.interrupt.injected
    if vcpu.guest_mode is None and kvm_vcpu_apicv_active(vcpu):
        return False
    return kvm_apic_has_interrupt(vcpu) != -1


def kvm_cpu_get_interrupt(vcpu: Vcpu) -> int:
    """Take the interrupt to be injected; -1 if there is none."""
    if vcpu.apic is None:
        return vcpu.interrupt.nr if vcpu.interrupt.injected else -1
    vector = kvm_apic_has_interrupt(vcpu)
    if vector != -1:
        kvm_apic_ack_interrupt(vcpu, vector)
    return vector
