"""Exits about events: task switches, windows, APIC virtualisation, and emulating until the state is valid.

KVM: handle_task_switch, kvm_task_switch, handle_invalid_guest_state, handle_interrupt_window,
handle_nmi_window, handle_triple_fault, handle_apic_write, handle_apic_eoi_induced, handle_notify,
handle_bus_lock_vmexit, handle_preemption_timer.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.task import TASK_SWITCH_GATE, emulator_task_switch
from emufuzz.emulator.x86emul import EMULATION_OK
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exceptions import (
    kvm_clear_exception_queue,
    kvm_clear_interrupt_queue,
    kvm_is_exception_pending,
)
from emufuzz.kvm.exit_instruction import kvm_emulate_halt_noskip
from emufuzz.kvm.exit_memory import block_nmi_again
from emufuzz.kvm.inject import vmx_interrupt_blocked
from emufuzz.kvm.interruptibility import skip_emulated_instruction
from emufuzz.kvm.lapic import kvm_apic_write_nodecode
from emufuzz.kvm.lapic_irq import kvm_apic_set_eoi_accelerated, kvm_apic_update_ppr
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.nmi import vmx_set_nmi_mask
from emufuzz.kvm.regs import kvm_rip_write, vmx_get_exit_qual
from emufuzz.kvm.rflags import kvm_set_rflags
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, Vcpu
from emufuzz.kvm.vmx_bits import (
    CPU_BASED_INTR_WINDOW_EXITING,
    CPU_BASED_NMI_WINDOW_EXITING,
    GUEST_INTR_STATE_NMI,
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
from emufuzz.kvm.x86 import (
    KVM_EXIT_INTERNAL_ERROR,
    KVM_INTERNAL_ERROR_EMULATION,
    init_emulate_ctxt,
    prepare_emulation_failure_exit,
)

KVM_EXIT_SHUTDOWN: Final = "SHUTDOWN"
KVM_EXIT_NOTIFY: Final = "NOTIFY"
KVM_EXIT_NESTED: Final = "NESTED_VMEXIT"  # not KVM's: L1 would run now, which is not modelled

#: Instructions that one invalid-state exit emulates at most.
INVALID_STATE_BURST: Final = 130

_NOTIFY_VM_CONTEXT_INVALID: Final = 1 << 0
_EXTERNAL_CAUSES: Final = (INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_EXT_INTR, INTR_TYPE_NMI_INTR)


# -- task switches -------------------------------------------------------------------------------


def handle_task_switch(machine: KvmMachine) -> int:
    """Exit 9. What was being delivered through a task gate counts as delivered."""
    vcpu = machine.vcpu
    info = vcpu.vmcs.values[vf.IDT_VECTORING_INFO_FIELD]
    kind = info & INTR_INFO_INTR_TYPE_MASK
    vectoring = bool(info & INTR_INFO_VALID_MASK)
    qualification = vmx_get_exit_qual(vcpu)
    reason = qualification >> 30 & 3
    error_code = None
    if reason == TASK_SWITCH_GATE and vectoring:
        error_code = _event_delivered(vcpu, kind, info)
    if not vectoring or kind not in _EXTERNAL_CAUSES:
        skip_emulated_instruction(vcpu)
    index = info & INTR_INFO_VECTOR_MASK if kind == INTR_TYPE_SOFT_INTR else -1
    return kvm_task_switch(machine, qualification & 0xFFFF, index, reason, error_code)


def _event_delivered(vcpu: Vcpu, kind: int, info: int) -> int | None:
    """Take the event from its queue; the error code that goes on the new task's stack."""
    if kind == INTR_TYPE_NMI_INTR:
        vcpu.nmi_injected = False
        vmx_set_nmi_mask(vcpu, masked=True)
    elif kind in (INTR_TYPE_EXT_INTR, INTR_TYPE_SOFT_INTR):
        kvm_clear_interrupt_queue(vcpu)
    elif kind in (INTR_TYPE_HARD_EXCEPTION, INTR_TYPE_SOFT_EXCEPTION):
        kvm_clear_exception_queue(vcpu)
        if kind == INTR_TYPE_HARD_EXCEPTION and info & INTR_INFO_DELIVER_CODE_MASK:
            return vcpu.vmcs.values[vf.IDT_VECTORING_ERROR_CODE]
    return None


def kvm_task_switch(
    machine: KvmMachine, tss_selector: int, idt_index: int, reason: int, error_code: int | None
) -> int:
    """Switch tasks: 1, or 0 if that cannot be emulated or would need a device.

    KVM deviation: a fault on the way is lost, and the guest goes on at the old RIP with what the
    switch has changed until then (SDM Vol. 3A 7.3).
    """
    vcpu, ctxt = machine.vcpu, machine.ctxt
    init_emulate_ctxt(machine)
    machine.emulations += 1
    result = emulator_task_switch(ctxt, tss_selector, idt_index, reason, error_code)
    if result != EMULATION_OK or machine.mmio.needed:
        machine.mmio.needed = False
        vcpu.run.leave(KVM_EXIT_INTERNAL_ERROR, suberror=KVM_INTERNAL_ERROR_EMULATION, data=[])
        return 0
    kvm_rip_write(vcpu, ctxt.eip)
    kvm_set_rflags(vcpu, ctxt.eflags)
    return 1


# -- invalid guest state -------------------------------------------------------------------------


def emulation_required_with_pending_exception(vcpu: Vcpu) -> bool:
    """An exception can be delivered neither by hardware nor by KVM."""
    if not vcpu.emulation_required or vcpu.rmode.vm86_active:
        return False
    return kvm_is_exception_pending(vcpu) or vcpu.exception.injected


def handle_invalid_guest_state(machine: KvmMachine) -> int:
    """Emulate until hardware can enter the guest, an event wants in, or a signal comes.

    The signal comes when `machine.budget` instructions are done.
    """
    vcpu = machine.vcpu
    window = vcpu.vmcs.values[vf.CPU_BASED_VM_EXEC_CONTROL] & CPU_BASED_INTR_WINDOW_EXITING
    for _ in range(INVALID_STATE_BURST):
        if not vcpu.emulation_required:
            break
        if window and not vmx_interrupt_blocked(vcpu):
            return handle_interrupt_window(machine)
        if KVM_REQ_EVENT in vcpu.requests:
            return 1
        machine.budget -= 1
        if not machine.emulate(0):
            return 0
        if emulation_required_with_pending_exception(vcpu):
            prepare_emulation_failure_exit(vcpu)
            return 0
        if vcpu.halt_request:
            vcpu.halt_request = False
            return kvm_emulate_halt_noskip(machine)
        if machine.budget <= 0:
            return 1
    return 1


def nested_triple_fault(vcpu: Vcpu) -> int:
    """L2's state cannot be entered: L1 gets a triple fault. L1 itself is not modelled."""
    vcpu.run.leave(KVM_EXIT_NESTED, vmexit_reason=er.EXIT_REASON_TRIPLE_FAULT)
    return 0


# -- windows, APIC, shutdown ---------------------------------------------------------------------


def handle_external_interrupt(machine: KvmMachine) -> int:  # noqa: ARG001 - a handler's signature
    """Exit 1: the host has taken its interrupt."""
    return 1


def handle_triple_fault(machine: KvmMachine) -> int:
    """Exit 2."""
    machine.vcpu.run.leave(KVM_EXIT_SHUTDOWN)
    machine.mmio.needed = False
    return 0


def handle_interrupt_window(machine: KvmMachine) -> int:
    """Exit 7: an interrupt can be taken now."""
    machine.vcpu.vmcs.clear_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_INTR_WINDOW_EXITING)
    machine.vcpu.make_request(KVM_REQ_EVENT)
    return 1


def handle_nmi_window(machine: KvmMachine) -> int:
    """Exit 8."""
    machine.vcpu.vmcs.clear_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_NMI_WINDOW_EXITING)
    machine.vcpu.make_request(KVM_REQ_EVENT)
    return 1


def handle_monitor_trap(machine: KvmMachine) -> int:  # noqa: ARG001 - a handler's signature
    """Exit 37, which KVM only uses for nested guests."""
    return 1


def handle_machine_check(machine: KvmMachine) -> int:  # noqa: ARG001 - a handler's signature
    """Exit 41: the host has dealt with it."""
    return 1


def handle_preemption_timer(machine: KvmMachine) -> int:  # noqa: ARG001 - a handler's signature
    """Exit 52: no time passes in the model, so no timer of the guest is due."""
    return 1


def handle_tpr_below_threshold(machine: KvmMachine) -> int:
    """Exit 43."""
    vcpu = machine.vcpu
    if vcpu.apic is not None:
        kvm_apic_update_ppr(vcpu)
    return 1


def handle_apic_eoi_induced(machine: KvmMachine) -> int:
    """Exit 45: hardware has done the EOI; a trap."""
    vcpu = machine.vcpu
    if vcpu.apic is not None:
        kvm_apic_set_eoi_accelerated(vcpu, vmx_get_exit_qual(vcpu) & 0xFF)
    return 1


def handle_apic_write(machine: KvmMachine) -> int:
    """Exit 56: hardware has stored the register; a trap."""
    vcpu = machine.vcpu
    if vcpu.apic is not None:
        kvm_apic_write_nodecode(vcpu, vmx_get_exit_qual(vcpu) & 0xFF0)
    return 1


def handle_pml_full(machine: KvmMachine) -> int:
    """Exit 62: the log of dirty pages was taken over before."""
    block_nmi_again(machine.vcpu)
    return 1


def handle_bus_lock_vmexit(machine: KvmMachine) -> int:
    """Exit 74: vmx_handle_exit leaves for userspace."""
    machine.vcpu.exit_reason |= er.VMX_EXIT_REASONS_BUS_LOCK_DETECTED
    return 1


def handle_notify(machine: KvmMachine) -> int:
    """Exit 75: no event window for long; fatal if the context is lost."""
    vcpu = machine.vcpu
    qualification = vmx_get_exit_qual(vcpu)
    if vcpu.options.vnmi and qualification & INTR_INFO_UNBLOCK_NMI:
        vcpu.vmcs.set_bits(vf.GUEST_INTERRUPTIBILITY_INFO, GUEST_INTR_STATE_NMI)
    invalid = qualification & _NOTIFY_VM_CONTEXT_INVALID
    if invalid:
        vcpu.run.leave(KVM_EXIT_NOTIFY, flags=invalid)
        return 0
    return 1
