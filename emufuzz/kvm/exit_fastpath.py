"""Exits that KVM handles with interrupts still off, before anything else looks at them.

KVM: vmx_exit_handlers_fastpath, handle_fastpath_hlt, handle_fastpath_preemption_timer. What WRMSR does
there is in `emufuzz.kvm.fastpath`.
"""

from __future__ import annotations

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.exit_info import FAILED_VMENTRY
from emufuzz.kvm.exit_instruction import kvm_emulate_halt
from emufuzz.kvm.fastpath import (
    EXIT_FASTPATH_EXIT_HANDLED,
    EXIT_FASTPATH_EXIT_USERSPACE,
    EXIT_FASTPATH_NONE,
    EXIT_FASTPATH_REENTER_GUEST,
    handle_fastpath_set_msr_irqoff,
)
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.vcpu import MP_STATE_RUNNABLE


def vmx_exit_handlers_fastpath(machine: KvmMachine) -> str:
    """The exit in the VMCS, as far as it needs no slow path: EXIT_FASTPATH_*.

    A nested guest's exits may be L1's, and a failed VM entry is none of the guest's: both are left alone.
    """
    vcpu = machine.vcpu
    if vcpu.exit_reason & FAILED_VMENTRY or vcpu.guest_mode is not None:
        return EXIT_FASTPATH_NONE
    basic = vcpu.exit_reason & er.VMX_EXIT_REASONS_BASIC_MASK
    if basic == er.EXIT_REASON_MSR_WRITE:
        return handle_fastpath_set_msr_irqoff(vcpu)
    if basic == er.EXIT_REASON_HLT:
        return handle_fastpath_hlt(machine)
    if basic == er.EXIT_REASON_PREEMPTION_TIMER:
        return EXIT_FASTPATH_REENTER_GUEST  # no time passes in the model: there is nothing to expire
    return EXIT_FASTPATH_NONE


def handle_fastpath_hlt(machine: KvmMachine) -> str:
    """HLT: userspace is asked, an event keeps the vCPU running, or it sleeps on the slow path."""
    if not kvm_emulate_halt(machine):
        return EXIT_FASTPATH_EXIT_USERSPACE
    if machine.vcpu.mp_state == MP_STATE_RUNNABLE:
        return EXIT_FASTPATH_REENTER_GUEST
    return EXIT_FASTPATH_EXIT_HANDLED
