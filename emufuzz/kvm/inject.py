"""Events on their way into the guest: VM-entry injection, the real-mode IVT, NMIs, re-injection.

KVM: kvm_check_and_inject_events, vmx_inject_exception, vmx_inject_irq, vmx_inject_nmi,
kvm_inject_realmode_interrupt (its caller's side), __vmx_complete_interrupts, vmx_cancel_injection,
process_smi, process_nmi, vmx_enable_nmi_window.
SDM Vol. 3C 24.8.3 "VM-Entry Controls for Event Injection", 26.6 "Event Injection".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import exceptions as ex
from emufuzz.arch.rflags import X86_EFLAGS_IF, X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.debugregs import DR7_GD, kvm_update_dr7
from emufuzz.kvm.exceptions import (
    DR6_BS,
    EXCPT_FAULT,
    exception_type,
    kvm_clear_exception_queue,
    kvm_clear_interrupt_queue,
    kvm_deliver_exception_payload,
    kvm_event_needs_reinjection,
    kvm_exception_is_soft,
    kvm_is_exception_pending,
    kvm_queue_interrupt,
    kvm_requeue_exception,
    kvm_requeue_exception_e,
)
from emufuzz.kvm.lapic_irq import kvm_cpu_get_interrupt, kvm_cpu_has_injectable_intr
from emufuzz.kvm.nmi import vmx_get_nmi_mask, vmx_set_nmi_mask
from emufuzz.kvm.regs import is_protmode, vmx_get_intr_info
from emufuzz.kvm.rflags import KVM_GUESTDBG_BLOCKIRQ, kvm_get_rflags, set_rflags_no_event
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.smm import enter_smm
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, KVM_REQ_TRIPLE_FAULT, KVM_REQ_VM_DEAD, Vcpu
from emufuzz.kvm.vmx_bits import (
    CPU_BASED_INTR_WINDOW_EXITING,
    CPU_BASED_NMI_WINDOW_EXITING,
    GUEST_ACTIVITY_ACTIVE,
    GUEST_ACTIVITY_HLT,
    GUEST_INTR_STATE_MOV_SS,
    GUEST_INTR_STATE_NMI,
    GUEST_INTR_STATE_STI,
    INTR_INFO_DELIVER_CODE_MASK,
    INTR_INFO_INTR_TYPE_MASK,
    INTR_INFO_UNBLOCK_NMI,
    INTR_INFO_VALID_MASK,
    INTR_INFO_VECTOR_MASK,
    INTR_TYPE_EXT_INTR,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_NMI_INTR,
    INTR_TYPE_SOFT_EXCEPTION,
    INTR_TYPE_SOFT_INTR,
)

_SHADOWS: Final = GUEST_INTR_STATE_STI | GUEST_INTR_STATE_MOV_SS


def kvm_inject_realmode_interrupt(vcpu: Vcpu, irq: int, inc_eip: int) -> None:
    """Deliver an event through the IVT by the emulator; if that fails the vCPU shuts down."""
    if not vcpu.hooks.emulate_int_real(irq, inc_eip):
        vcpu.make_request(KVM_REQ_TRIPLE_FAULT)


def _clear_hlt(vcpu: Vcpu) -> None:
    """An event wakes a guest that halts without exiting (KVM: vmx_clear_hlt)."""
    if vcpu.options.hlt_in_guest and vcpu.vmcs.values[vf.GUEST_ACTIVITY_STATE] == GUEST_ACTIVITY_HLT:
        vcpu.vmcs.write(vf.GUEST_ACTIVITY_STATE, GUEST_ACTIVITY_ACTIVE)


def vmx_inject_exception(vcpu: Vcpu) -> None:
    """Give the queued exception to the next VM entry, or in the vm86 stand-in to the emulator."""
    queued, vmcs = vcpu.exception, vcpu.vmcs
    vector = queued.vector
    if vector == ex.DB_VECTOR and vmx_get_rflags(vcpu) & X86_EFLAGS_TF:
        if vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & _SHADOWS:
            # VM entry insists on a pending BS here (SDM Vol. 3C 26.3.1.5)
            vmcs.set_bits(vf.GUEST_PENDING_DBG_EXCEPTIONS, DR6_BS)
    kvm_deliver_exception_payload(vcpu, queued)
    info = vector | INTR_INFO_VALID_MASK
    if queued.has_error_code:
        vmcs.write(vf.VM_ENTRY_EXCEPTION_ERROR_CODE, queued.error_code & 0xFFFF)
        info |= INTR_INFO_DELIVER_CODE_MASK
    soft = kvm_exception_is_soft(vector)
    if vcpu.rmode.vm86_active:
        kvm_inject_realmode_interrupt(vcpu, vector, vcpu.event_exit_inst_len if soft else 0)
        return
    if soft:
        vmcs.write(vf.VM_ENTRY_INSTRUCTION_LEN, vcpu.event_exit_inst_len)
    info |= INTR_TYPE_SOFT_EXCEPTION if soft else INTR_TYPE_HARD_EXCEPTION
    vmcs.write(vf.VM_ENTRY_INTR_INFO_FIELD, info)
    _clear_hlt(vcpu)


def kvm_inject_exception(vcpu: Vcpu) -> None:
    """Inject what is queued; the IVT of real mode has no error codes (SDM Vol. 3A 20.1.4)."""
    vcpu.exception.has_error_code = vcpu.exception.has_error_code and is_protmode(vcpu)
    vmx_inject_exception(vcpu)


def vmx_inject_irq(vcpu: Vcpu) -> None:
    """Give the queued interrupt to the next VM entry."""
    queued = vcpu.interrupt
    if vcpu.rmode.vm86_active:
        kvm_inject_realmode_interrupt(vcpu, queued.nr, vcpu.event_exit_inst_len if queued.soft else 0)
        return
    info = queued.nr | INTR_INFO_VALID_MASK
    if queued.soft:
        info |= INTR_TYPE_SOFT_INTR
        vcpu.vmcs.write(vf.VM_ENTRY_INSTRUCTION_LEN, vcpu.event_exit_inst_len)
    else:
        info |= INTR_TYPE_EXT_INTR
    vcpu.vmcs.write(vf.VM_ENTRY_INTR_INFO_FIELD, info)
    _clear_hlt(vcpu)


def vmx_inject_nmi(vcpu: Vcpu) -> None:
    """Give an NMI to the next VM entry; without virtual NMIs KVM itself remembers the blocking."""
    if not vcpu.options.vnmi:
        vcpu.soft_vnmi_blocked = True
    vcpu.nmi_known_unmasked = False
    if vcpu.rmode.vm86_active:
        kvm_inject_realmode_interrupt(vcpu, ex.NMI_VECTOR, 0)
        return
    vcpu.vmcs.write(vf.VM_ENTRY_INTR_INFO_FIELD, INTR_TYPE_NMI_INTR | INTR_INFO_VALID_MASK | ex.NMI_VECTOR)
    _clear_hlt(vcpu)


def kvm_check_and_inject_events(vcpu: Vcpu) -> bool:
    """Before an entry: re-inject an interrupted delivery, then inject the first of what is pending.

    Interrupts are those that `kvm_queue_interrupt` has queued, and those of an in-kernel local APIC.

    Returns:
        Whether the entry must exit at once, as an NMI or interrupt waits for the event that goes first.
    """
    if vcpu.exception.injected:
        kvm_inject_exception(vcpu)
    elif not kvm_is_exception_pending(vcpu):
        if vcpu.nmi_injected:
            vmx_inject_nmi(vcpu)
        elif vcpu.interrupt.injected:
            vmx_inject_irq(vcpu)
    can_inject = not kvm_event_needs_reinjection(vcpu)
    if vcpu.exception.pending:
        _inject_pending_exception(vcpu)
        can_inject = False
    if vcpu.guest_debug & KVM_GUESTDBG_BLOCKIRQ:
        return False
    if vcpu.smi_pending:
        if not can_inject:
            return True
        can_inject = not _serve_smi(vcpu)
    if vcpu.nmi_pending:
        if not can_inject or (vcpu.guest_mode is not None and vcpu.guest_mode.exit_on_nmi):
            return True
        can_inject = not _inject_pending_nmi(vcpu)
    return kvm_cpu_has_injectable_intr(vcpu) and _inject_interrupt(vcpu, can_inject=can_inject)


def _serve_smi(vcpu: Vcpu) -> bool:
    """Enter SMM, which is the result; the SMI waits in SMM (KVM: vmx_smi_allowed), here also in L2."""
    if vcpu.smm or vcpu.guest_mode is not None:
        return False
    vcpu.smi_pending = False
    if not enter_smm(vcpu):
        vcpu.make_request(KVM_REQ_VM_DEAD)
    return True


def _inject_pending_nmi(vcpu: Vcpu) -> bool:
    """Inject an NMI unless it is blocked, which is the result; what is left opens a window."""
    allowed = not vmx_nmi_blocked(vcpu)
    if allowed:
        vcpu.nmi_pending -= 1
        vcpu.nmi_injected = True
        vmx_inject_nmi(vcpu)
    if vcpu.nmi_pending:
        vmx_enable_nmi_window(vcpu)
    return allowed


def _inject_interrupt(vcpu: Vcpu, *, can_inject: bool) -> bool:
    """Inject the local APIC's interrupt or wait for a window; True if another event goes first."""
    if not can_inject or (vcpu.guest_mode is not None and vcpu.guest_mode.exit_on_intr):
        return True
    if not vmx_interrupt_blocked(vcpu):
        kvm_queue_interrupt(vcpu, kvm_cpu_get_interrupt(vcpu), soft=False)
        vmx_inject_irq(vcpu)
    if kvm_cpu_has_injectable_intr(vcpu):
        vmx_enable_irq_window(vcpu)
    return False


def _inject_pending_exception(vcpu: Vcpu) -> None:
    """Faults set RF in the pushed flags, #DB does not; #DB clears DR7.GD (SDM Vol. 3B 17.2.4)."""
    queued = vcpu.exception
    if exception_type(queued.vector) == EXCPT_FAULT:
        set_rflags_no_event(vcpu, kvm_get_rflags(vcpu) | X86_EFLAGS_RF)
    if queued.vector == ex.DB_VECTOR:
        kvm_deliver_exception_payload(vcpu, queued)
        if vcpu.dr7 & DR7_GD:
            vcpu.dr7 &= ~DR7_GD
            kvm_update_dr7(vcpu)
    kvm_inject_exception(vcpu)
    queued.pending = False
    queued.injected = True


def process_smi(vcpu: Vcpu) -> None:
    """An SMI that arrived becomes pending."""
    vcpu.smi_pending = True
    vcpu.make_request(KVM_REQ_EVENT)


def process_nmi(vcpu: Vcpu) -> None:
    """NMIs that arrived become pending: two at most, one while NMIs are blocked."""
    limit = 1 if vmx_get_nmi_mask(vcpu) or vcpu.nmi_injected else 2
    vcpu.nmi_pending = min(vcpu.nmi_pending + vcpu.nmi_queued, limit)
    vcpu.nmi_queued = 0
    if vcpu.nmi_pending:
        vcpu.make_request(KVM_REQ_EVENT)


def vmx_nmi_blocked(vcpu: Vcpu) -> bool:
    """An NMI has to wait; never where L1 gets it as an exit of L2."""
    if vcpu.guest_mode is not None and vcpu.guest_mode.exit_on_nmi:
        return False
    if not vcpu.options.vnmi and vcpu.soft_vnmi_blocked:
        return True
    return bool(vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & (_SHADOWS | GUEST_INTR_STATE_NMI))


def vmx_interrupt_blocked(vcpu: Vcpu) -> bool:
    """An interrupt has to wait for IF or the end of a shadow; never where L1 gets it."""
    if vcpu.guest_mode is not None and vcpu.guest_mode.exit_on_intr:
        return False
    if not vmx_get_rflags(vcpu) & X86_EFLAGS_IF:
        return True
    return bool(vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & _SHADOWS)


def vmx_enable_irq_window(vcpu: Vcpu) -> None:
    """Have the guest exit as soon as an interrupt could be taken."""
    vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_INTR_WINDOW_EXITING)


def vmx_enable_nmi_window(vcpu: Vcpu) -> None:
    """The same for NMIs; an interrupt window stands in where hardware has none or STI blocks it."""
    sti = vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & GUEST_INTR_STATE_STI
    if sti or not vcpu.options.vnmi:
        vmx_enable_irq_window(vcpu)
    else:
        vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_NMI_WINDOW_EXITING)


def vmx_recover_nmi_blocking(vcpu: Vcpu) -> None:
    """An exception out of IRET, which had unblocked NMIs: block them until it has run (SDM Vol. 3C 27.2.2).

    The bit that tells means nothing for a #DF or during the delivery of an event.
    """
    if not vcpu.options.vnmi or vcpu.nmi_known_unmasked:
        return
    info, vectoring = vmx_get_intr_info(vcpu), vcpu.vmcs.values[vf.IDT_VECTORING_INFO_FIELD]
    unblocked = info & INTR_INFO_VALID_MASK and info & INTR_INFO_UNBLOCK_NMI
    if unblocked and info & INTR_INFO_VECTOR_MASK != ex.DF_VECTOR and not vectoring & INTR_INFO_VALID_MASK:
        vcpu.vmcs.set_bits(vf.GUEST_INTERRUPTIBILITY_INFO, GUEST_INTR_STATE_NMI)
    else:
        blocked = vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & GUEST_INTR_STATE_NMI
        vcpu.nmi_known_unmasked = not blocked


def vmx_complete_interrupts(vcpu: Vcpu) -> None:
    """After a VM exit: queue again what was being delivered (SDM Vol. 3C 27.2.4)."""
    _complete_interrupts(
        vcpu,
        vcpu.vmcs.values[vf.IDT_VECTORING_INFO_FIELD],
        vf.VM_EXIT_INSTRUCTION_LEN,
        vf.IDT_VECTORING_ERROR_CODE,
    )


def vmx_cancel_injection(vcpu: Vcpu) -> None:
    """The entry does not happen: take the event back from the entry fields."""
    _complete_interrupts(
        vcpu,
        vcpu.vmcs.values[vf.VM_ENTRY_INTR_INFO_FIELD],
        vf.VM_ENTRY_INSTRUCTION_LEN,
        vf.VM_ENTRY_EXCEPTION_ERROR_CODE,
    )
    vcpu.vmcs.write(vf.VM_ENTRY_INTR_INFO_FIELD, 0)


def _complete_interrupts(vcpu: Vcpu, info: int, length_field: int, error_code_field: int) -> None:
    vcpu.nmi_injected = False
    kvm_clear_exception_queue(vcpu)
    kvm_clear_interrupt_queue(vcpu)
    if not info & INTR_INFO_VALID_MASK:
        return
    vcpu.make_request(KVM_REQ_EVENT)
    vector, kind = info & INTR_INFO_VECTOR_MASK, info & INTR_INFO_INTR_TYPE_MASK
    if kind in (INTR_TYPE_SOFT_EXCEPTION, INTR_TYPE_SOFT_INTR):
        vcpu.event_exit_inst_len = vcpu.vmcs.values[length_field]
    if kind == INTR_TYPE_NMI_INTR:
        vcpu.nmi_injected = True
        vmx_set_nmi_mask(vcpu, masked=False)
    elif kind in (INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_SOFT_EXCEPTION):
        if info & INTR_INFO_DELIVER_CODE_MASK:
            kvm_requeue_exception_e(vcpu, vector, vcpu.vmcs.values[error_code_field])
        else:
            kvm_requeue_exception(vcpu, vector)
    elif kind in (INTR_TYPE_SOFT_INTR, INTR_TYPE_EXT_INTR):
        kvm_queue_interrupt(vcpu, vector, soft=kind == INTR_TYPE_SOFT_INTR)
