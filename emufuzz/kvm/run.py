"""KVM_RUN: completions first, then the guest, exit by exit, until userspace is needed.

KVM: kvm_arch_vcpu_ioctl_run, vcpu_run, vcpu_enter_guest, vmx_vcpu_pre_run, vmx_vcpu_run (its bail-out
for a state that cannot be entered). The model has no processor that could run the guest: where VM
entry would succeed, KVM_RUN ends with GUEST_ENTERED, and what is queued for the guest stays queued,
so that it can be looked at.
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.exit_event import (
    KVM_EXIT_NESTED,
    KVM_EXIT_SHUTDOWN,
    emulation_required_with_pending_exception,
)
from emufuzz.kvm.exit_info import FAILED_VMENTRY
from emufuzz.kvm.exits import vmx_handle_exit
from emufuzz.kvm.hyperv_calls import kvm_hv_vcpu_flush_tlb
from emufuzz.kvm.inject import (
    kvm_check_and_inject_events,
    process_nmi,
    process_smi,
    vmx_cancel_injection,
)
from emufuzz.kvm.lapic_timer import apic_has_pending_timer, kvm_inject_apic_timer_irqs
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_register_mark_available, kvm_rip_read
from emufuzz.kvm.vcpu import (
    KVM_EXIT_UNKNOWN,
    KVM_REQ_EVENT,
    KVM_REQ_NMI,
    KVM_REQ_SMI,
    KVM_REQ_TRIPLE_FAULT,
    KVM_REQ_VM_DEAD,
    MP_STATE_RUNNABLE,
    VCPU_EXREG_EXIT_INFO_1,
    VCPU_EXREG_EXIT_INFO_2,
    Vcpu,
)
from emufuzz.kvm.x86 import prepare_emulation_failure_exit

KVM_EXIT_INTR: Final = "INTR"

#: Requests that keep vcpu_enter_guest from entering; others have been served by then.
_EXIT_REQUESTS: Final = frozenset(
    {KVM_REQ_EVENT, KVM_REQ_NMI, KVM_REQ_SMI, KVM_REQ_TRIPLE_FAULT, KVM_REQ_VM_DEAD}
)
#: Rounds without an instruction; more than delivering all that may be pending takes.
_MAX_IDLE: Final = 16

# How KVM_RUN ends.
USERSPACE: Final = 0  # `vcpu.run` says why
GUEST_ENTERED: Final = 1
HALTED: Final = 2  # the vCPU sleeps in the kernel


def after_exit(machine: KvmMachine, result: int) -> int:
    """An exit was handled with `result`: go on as vcpu_run does; how KVM_RUN ends."""
    return vcpu_run(machine) if result > 0 else _left(machine.vcpu)


def vmx_vcpu_pre_run(vcpu: Vcpu) -> int:
    """A state that cannot be entered, with an exception that can then not be delivered."""
    if emulation_required_with_pending_exception(vcpu):
        prepare_emulation_failure_exit(vcpu)
        return 0
    return 1


def kvm_run(machine: KvmMachine) -> int:
    """One KVM_RUN, with userspace's answer to the last exit in `vcpu.run.data`."""
    vcpu = machine.vcpu
    completion = vcpu.complete_userspace_io
    if completion is not None:
        vcpu.complete_userspace_io = None
        if completion(vcpu) <= 0:
            return _left(vcpu)
    if vmx_vcpu_pre_run(vcpu) <= 0:
        return _left(vcpu)
    vcpu.run.leave(KVM_EXIT_UNKNOWN)
    return vcpu_run(machine)


def vcpu_run(machine: KvmMachine) -> int:
    """Enter the guest, or emulate where that is not possible.

    KVM deviation: in a state that cannot be entered, an event behind one that hardware would have to
    deliver goes round without end, until a signal ends KVM_RUN (SDM Vol. 3A 6.9).
    """
    vcpu = machine.vcpu
    idle = 0
    while vcpu.mp_state == MP_STATE_RUNNABLE:
        if vcpu.check_request(KVM_REQ_VM_DEAD):
            vcpu.run.leave(KVM_EXIT_UNKNOWN)  # KVM_RUN fails with EIO, and says no more
            return _left(vcpu)
        if vcpu.check_request(KVM_REQ_TRIPLE_FAULT):
            vcpu.run.leave(KVM_EXIT_SHUTDOWN)
            machine.mmio.needed = False
            return _left(vcpu)
        if not vcpu.emulation_required:
            return _entered(vcpu)
        if machine.budget <= 0 or idle > _MAX_IDLE:
            vcpu.run.leave(KVM_EXIT_INTR)
            return _left(vcpu)
        before = machine.emulations
        if inject_events(vcpu) and invalid_state_exit(machine) <= 0:
            return _left(vcpu)
        idle = idle + 1 if machine.emulations == before else 0
    return HALTED


def _entered(vcpu: Vcpu) -> int:
    if vcpu.trace is not None:
        vcpu.trace.emit("kvm_entry", rip=kvm_rip_read(vcpu), immediate_exit=False)
    return GUEST_ENTERED


def _left(vcpu: Vcpu) -> int:
    """Traced unless it is KVM that runs L1 now, and userspace hears nothing of that."""
    if vcpu.trace is not None and vcpu.run.exit_reason != KVM_EXIT_NESTED:
        vcpu.trace.emit("kvm_userspace_exit", reason=vcpu.run.exit_reason, errno=0)
    return USERSPACE


def inject_events(vcpu: Vcpu) -> bool:
    """What vcpu_enter_guest does for events: whether it goes on to enter the guest.

    Delivery through the IVT, which the emulator does, loads RFLAGS and so asks for another look at
    events: the entry is cancelled, and with nothing in the entry fields the event counts as delivered.
    """
    if apic_has_pending_timer(vcpu):
        kvm_inject_apic_timer_irqs(vcpu)
    kvm_hv_vcpu_flush_tlb(vcpu)
    if vcpu.check_request(KVM_REQ_SMI):
        process_smi(vcpu)
    if vcpu.check_request(KVM_REQ_NMI):
        process_nmi(vcpu)
    waits = vcpu.check_request(KVM_REQ_EVENT) and kvm_check_and_inject_events(vcpu)
    cancelled = bool(vcpu.requests & _EXIT_REQUESTS)
    if cancelled:
        vmx_cancel_injection(vcpu)
    if waits:
        vcpu.make_request(KVM_REQ_EVENT)
    return not cancelled


def invalid_state_exit(machine: KvmMachine) -> int:
    """VM entry is not even tried: the exit that it would have failed with, handled."""
    vcpu = machine.vcpu
    vcpu.exit_reason = FAILED_VMENTRY | er.EXIT_REASON_INVALID_STATE
    vcpu.exit_info_1 = vcpu.exit_info_2 = 0
    kvm_register_mark_available(vcpu, VCPU_EXREG_EXIT_INFO_1)
    kvm_register_mark_available(vcpu, VCPU_EXREG_EXIT_INFO_2)
    return vmx_handle_exit(machine)
