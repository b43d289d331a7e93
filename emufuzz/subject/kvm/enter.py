"""VM exits made by hand: the VMCS and the vCPU as hardware leaves them.

SDM Vol. 3C 27.2 "Recording VM-Exit Information and Updating VM-Entry Control Fields".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exceptions import kvm_queue_interrupt
from emufuzz.kvm.inject import vmx_complete_interrupts, vmx_recover_nmi_blocking
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import vmx_after_exit, vmx_before_entry
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, Vcpu
from emufuzz.kvm.vmx_bits import (
    INTR_INFO_DELIVER_CODE_MASK,
    INTR_INFO_VALID_MASK,
    INTR_TYPE_HARD_EXCEPTION,
)

_MAX_LENGTH: Final = 15


class ExitInfo:
    """What an exit reports; a case's `kvm` may override each member.

    `by_instruction`: the instruction made the exit, always or because a control says so. Hardware saves
    RF as 0 then (SDM Vol. 3C 27.3.3).
    """

    __slots__ = (
        "by_instruction", "error_code", "gpa", "instruction_info", "intr_info", "length", "qualification",
        "reason",
    )  # fmt: skip

    def __init__(self, reason: int, qualification: int = 0, *, length: int = 0) -> None:
        self.reason = reason
        self.qualification = qualification
        self.length = length
        self.by_instruction = False
        self.gpa = 0
        self.instruction_info = 0
        self.intr_info = 0
        self.error_code = 0

    def exception(self, vector: int, error_code: int | None = None) -> ExitInfo:
        """Report an exception of hardware's."""
        self.intr_info = INTR_INFO_VALID_MASK | INTR_TYPE_HARD_EXCEPTION | vector
        if error_code is not None:
            self.intr_info |= INTR_INFO_DELIVER_CODE_MASK
            self.error_code = error_code
        return self


def hardware_exit(machine: KvmMachine, info: ExitInfo, kvm: Mapping[str, Any]) -> None:
    """Enter the guest and let it exit at once with `info`, as far as `kvm` does not say otherwise.

    What was requested of KVM before, it has done on the way in (KVM: vcpu_enter_guest).
    """
    vcpu = machine.vcpu
    vmx_before_entry(vcpu)
    vcpu.requests.clear()
    store = vcpu.vmcs.hw_write
    if info.by_instruction:
        store(vf.GUEST_RFLAGS, vcpu.vmcs.values[vf.GUEST_RFLAGS] & ~X86_EFLAGS_RF)
    store(vf.EXIT_QUALIFICATION, kvm.get("exit_qualification", info.qualification))
    store(vf.GUEST_PHYSICAL_ADDRESS, kvm.get("guest_physical_address", info.gpa))
    store(vf.VMX_INSTRUCTION_INFO, kvm.get("instruction_info", info.instruction_info))
    store(vf.VM_EXIT_INSTRUCTION_LEN, min(kvm.get("instruction_length", info.length), _MAX_LENGTH))
    store(vf.VM_EXIT_INTR_INFO, info.intr_info)
    store(vf.VM_EXIT_INTR_ERROR_CODE, info.error_code)
    store(vf.IDT_VECTORING_INFO_FIELD, kvm.get("vectoring_info", 0))
    store(vf.IDT_VECTORING_ERROR_CODE, kvm.get("vectoring_error_code", 0))
    store(vf.VM_EXIT_REASON, info.reason)
    vcpu.exit_reason = info.reason
    vmx_after_exit(vcpu)
    vmx_recover_nmi_blocking(vcpu)
    vmx_complete_interrupts(vcpu)


def queue_events(vcpu: Vcpu, kvm: Mapping[str, Any]) -> None:
    """What a case's `kvm` says is pending or being delivered (KVM: KVM_SET_VCPU_EVENTS)."""
    pending = kvm.get("pending")
    if pending is not None:
        _queue_exception(vcpu, pending)
    interrupt = kvm.get("interrupt")
    if interrupt is not None:
        kvm_queue_interrupt(vcpu, interrupt["vector"], soft=bool(interrupt.get("soft")))
        vcpu.make_request(KVM_REQ_EVENT)
    vcpu.nmi_pending = kvm.get("nmi", 0)
    if vcpu.nmi_pending:
        vcpu.make_request(KVM_REQ_EVENT)


def _queue_exception(vcpu: Vcpu, pending: Mapping[str, Any]) -> None:
    """`nested` goes to L1's queue; `injected` is in the middle of its delivery."""
    nested = bool(pending.get("nested"))
    queued = vcpu.exception_vmexit if nested else vcpu.exception
    injected = bool(pending.get("injected"))
    queued.pending, queued.injected = not injected, injected
    queued.vector = pending["vector"]
    queued.has_error_code = pending.get("error_code") is not None
    queued.error_code = pending.get("error_code") or 0
    queued.has_payload = pending.get("payload") is not None and not injected
    queued.payload = pending.get("payload") or 0
    vcpu.make_request(KVM_REQ_EVENT)
