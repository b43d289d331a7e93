"""VM exits: what comes before every handler, and the table of handlers.

KVM: vmx_handle_exit, __vmx_handle_exit, kvm_vmx_exit_handlers, and what vmx_vcpu_run and
vcpu_enter_guest do between an exit and its handler. The handlers are in exit_memory,
exit_exception, exit_instruction, exit_system and exit_event.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, TypeAlias

from emufuzz.kvm import exit_event as event
from emufuzz.kvm import exit_exception as exception
from emufuzz.kvm import exit_instruction as insn
from emufuzz.kvm import exit_memory as memory
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import exit_system as system
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exit_fastpath import vmx_exit_handlers_fastpath
from emufuzz.kvm.exit_info import FAILED_VMENTRY, vmx_get_exit_info
from emufuzz.kvm.fastpath import (
    EXIT_FASTPATH_EXIT_HANDLED,
    EXIT_FASTPATH_EXIT_USERSPACE,
    EXIT_FASTPATH_NONE,
    EXIT_FASTPATH_REENTER_GUEST,
)
from emufuzz.kvm.inject import vmx_interrupt_blocked
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_rip_read, vmx_get_exit_qual
from emufuzz.kvm.vcpu import Vcpu
from emufuzz.kvm.vmx_bits import INTR_INFO_VALID_MASK
from emufuzz.kvm.x86 import KVM_EXIT_INTERNAL_ERROR

Handler: TypeAlias = Callable[[KvmMachine], int]

KVM_EXIT_FAIL_ENTRY: Final = "FAIL_ENTRY"
KVM_EXIT_X86_BUS_LOCK: Final = "X86_BUS_LOCK"
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4

LAST_VMENTRY_CPU: Final = 0

#: Exits that may interrupt the delivery of an event; any other one during a delivery is an error.
_DELIVERY_ALLOWED: Final = frozenset({
    er.EXIT_REASON_EXCEPTION_NMI, er.EXIT_REASON_EPT_VIOLATION, er.EXIT_REASON_PML_FULL,
    er.EXIT_REASON_APIC_ACCESS, er.EXIT_REASON_TASK_SWITCH, er.EXIT_REASON_NOTIFY,
})  # fmt: skip

# fmt: off
KVM_VMX_EXIT_HANDLERS: Final[dict[int, Handler]] = {
    er.EXIT_REASON_EXCEPTION_NMI:       exception.handle_exception_nmi,
    er.EXIT_REASON_EXTERNAL_INTERRUPT:  event.handle_external_interrupt,
    er.EXIT_REASON_TRIPLE_FAULT:        event.handle_triple_fault,
    er.EXIT_REASON_INTERRUPT_WINDOW:    event.handle_interrupt_window,
    er.EXIT_REASON_NMI_WINDOW:          event.handle_nmi_window,
    er.EXIT_REASON_TASK_SWITCH:         event.handle_task_switch,
    er.EXIT_REASON_CPUID:               insn.kvm_emulate_cpuid,
    er.EXIT_REASON_HLT:                 insn.kvm_emulate_halt,
    er.EXIT_REASON_INVD:                insn.kvm_emulate_as_nop,
    er.EXIT_REASON_INVLPG:              insn.handle_invlpg,
    er.EXIT_REASON_RDPMC:               insn.kvm_emulate_rdpmc,
    er.EXIT_REASON_VMCALL:              insn.handle_vmcall,
    er.EXIT_REASON_VMCLEAR:             insn.handle_vmx_instruction,
    er.EXIT_REASON_VMLAUNCH:            insn.handle_vmx_instruction,
    er.EXIT_REASON_VMPTRLD:             insn.handle_vmx_instruction,
    er.EXIT_REASON_VMPTRST:             insn.handle_vmx_instruction,
    er.EXIT_REASON_VMREAD:              insn.handle_vmx_instruction,
    er.EXIT_REASON_VMRESUME:            insn.handle_vmx_instruction,
    er.EXIT_REASON_VMWRITE:             insn.handle_vmx_instruction,
    er.EXIT_REASON_VMOFF:               insn.handle_vmx_instruction,
    er.EXIT_REASON_VMON:                insn.handle_vmx_instruction,
    er.EXIT_REASON_CR_ACCESS:           system.handle_cr,
    er.EXIT_REASON_DR_ACCESS:           system.handle_dr,
    er.EXIT_REASON_IO_INSTRUCTION:      insn.handle_io,
    er.EXIT_REASON_MSR_READ:            system.kvm_emulate_rdmsr,
    er.EXIT_REASON_MSR_WRITE:           system.kvm_emulate_wrmsr,
    er.EXIT_REASON_MWAIT_INSTRUCTION:   insn.kvm_emulate_monitor_mwait,
    er.EXIT_REASON_MONITOR_TRAP_FLAG:   event.handle_monitor_trap,
    er.EXIT_REASON_MONITOR_INSTRUCTION: insn.kvm_emulate_monitor_mwait,
    er.EXIT_REASON_PAUSE_INSTRUCTION:   insn.handle_pause,
    er.EXIT_REASON_MCE_DURING_VMENTRY:  event.handle_machine_check,
    er.EXIT_REASON_TPR_BELOW_THRESHOLD: event.handle_tpr_below_threshold,
    er.EXIT_REASON_APIC_ACCESS:         memory.handle_apic_access,
    er.EXIT_REASON_EOI_INDUCED:         event.handle_apic_eoi_induced,
    er.EXIT_REASON_GDTR_IDTR:           memory.handle_desc,
    er.EXIT_REASON_LDTR_TR:             memory.handle_desc,
    er.EXIT_REASON_EPT_VIOLATION:       memory.handle_ept_violation,
    er.EXIT_REASON_EPT_MISCONFIG:       memory.handle_ept_misconfig,
    er.EXIT_REASON_INVEPT:              insn.handle_vmx_instruction,
    er.EXIT_REASON_PREEMPTION_TIMER:    event.handle_preemption_timer,
    er.EXIT_REASON_INVVPID:             insn.handle_vmx_instruction,
    er.EXIT_REASON_WBINVD:              insn.kvm_emulate_as_nop,
    er.EXIT_REASON_XSETBV:              system.kvm_emulate_xsetbv,
    er.EXIT_REASON_APIC_WRITE:          event.handle_apic_write,
    er.EXIT_REASON_RDRAND:              insn.kvm_handle_invalid_op,
    er.EXIT_REASON_INVPCID:             system.handle_invpcid,
    er.EXIT_REASON_VMFUNC:              insn.handle_vmx_instruction,
    er.EXIT_REASON_ENCLS:               insn.kvm_handle_invalid_op,
    er.EXIT_REASON_RDSEED:              insn.kvm_handle_invalid_op,
    er.EXIT_REASON_PML_FULL:            event.handle_pml_full,
    er.EXIT_REASON_BUS_LOCK:            event.handle_bus_lock_vmexit,
    er.EXIT_REASON_NOTIFY:              event.handle_notify,
}
# fmt: on


def handle_hardware_exit(machine: KvmMachine) -> int:
    """Handle an exit that hardware has made, fastpath first: 1 resumes the guest, 0 leaves for userspace.

    A guest that the fastpath enters again at once takes the slow path if a request is pending.
    """
    vcpu = machine.vcpu
    _trace_exit(vcpu)
    fastpath = vmx_exit_handlers_fastpath(machine)
    if fastpath == EXIT_FASTPATH_REENTER_GUEST:
        if not vcpu.requests:
            return 1
        fastpath = EXIT_FASTPATH_EXIT_HANDLED
    return vmx_handle_exit(machine, fastpath)


def vmx_handle_exit(machine: KvmMachine, fastpath: str = EXIT_FASTPATH_NONE) -> int:
    """Handle the exit that the VMCS describes: 1 resumes the guest, 0 leaves for userspace.

    `fastpath` is EXIT_FASTPATH_*, what was already done with interrupts off.
    """
    vcpu = machine.vcpu
    result = _handle_exit(machine, fastpath)
    if vcpu.exit_reason & er.VMX_EXIT_REASONS_BUS_LOCK_DETECTED and result > 0:
        vcpu.run.leave(KVM_EXIT_X86_BUS_LOCK)
        result = 0
    return result


def _trace_exit(vcpu: Vcpu) -> None:
    if vcpu.trace is not None:
        reason, info1, info2, intr_info, error_code = vmx_get_exit_info(vcpu)
        vcpu.trace.emit(
            "kvm_exit", exit_reason=reason, guest_rip=kvm_rip_read(vcpu), info1=info1, info2=info2,
            intr_info=intr_info, error_code=error_code,
        )  # fmt: skip


def _handle_exit(machine: KvmMachine, fastpath: str) -> int:
    vcpu = machine.vcpu
    basic = vcpu.exit_reason & 0xFFFF
    if fastpath == EXIT_FASTPATH_EXIT_USERSPACE:
        return 0
    if vcpu.guest_mode is not None:
        if basic == er.EXIT_REASON_PML_FULL:
            return _unexpected(vcpu)
        if vcpu.emulation_required:
            return event.nested_triple_fault(vcpu)
    if vcpu.emulation_required:
        return event.handle_invalid_guest_state(machine)
    if vcpu.exit_reason & FAILED_VMENTRY:
        vcpu.run.leave(
            KVM_EXIT_FAIL_ENTRY, hardware_entry_failure_reason=vcpu.exit_reason, cpu=LAST_VMENTRY_CPU
        )
        return 0
    vectoring_info = vcpu.vmcs.values[vf.IDT_VECTORING_INFO_FIELD]
    if vectoring_info & INTR_INFO_VALID_MASK and basic not in _DELIVERY_ALLOWED:
        return _during_delivery(vcpu, vectoring_info, basic)
    if not vcpu.options.vnmi and vcpu.soft_vnmi_blocked and not vmx_interrupt_blocked(vcpu):
        vcpu.soft_vnmi_blocked = False
    if fastpath != EXIT_FASTPATH_NONE:
        return 1
    handler = KVM_VMX_EXIT_HANDLERS.get(basic)
    return _unexpected(vcpu) if handler is None else handler(machine)


def _during_delivery(vcpu: Vcpu, vectoring_info: int, basic: int) -> int:
    """An exit while an event was delivered that cannot be repeated.

    An EPT misconfiguration would come again for ever, as the delivery needs a device's memory.
    """
    data = [vectoring_info, vcpu.exit_reason, vmx_get_exit_qual(vcpu)]
    if basic == er.EXIT_REASON_EPT_MISCONFIG:
        data.append(vcpu.vmcs.values[vf.GUEST_PHYSICAL_ADDRESS])
    data.append(LAST_VMENTRY_CPU)
    vcpu.run.leave(KVM_EXIT_INTERNAL_ERROR, suberror=KVM_INTERNAL_ERROR_DELIVERY_EV, data=data)
    return 0


def _unexpected(vcpu: Vcpu) -> int:
    vcpu.run.leave(
        KVM_EXIT_INTERNAL_ERROR,
        suberror=KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
        data=[vcpu.exit_reason, LAST_VMENTRY_CPU],
    )
    return 0
