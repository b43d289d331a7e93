"""What became of a machine, in the form of an Outcome."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import DB_VECTOR, PF_VECTOR
from emufuzz.case.devices import Devices, trace_to_obj
from emufuzz.case.model import Case, Fault, Outcome, System
from emufuzz.emulator.x86emul import (
    EMULATION_OK,
    X86EMUL_CONTINUE,
    X86EMUL_IO_NEEDED,
    X86EMUL_NAMES,
    X86EMUL_RETRY_INSTR,
    X86EMUL_UNHANDLEABLE,
)
from emufuzz.kvm.interruptibility import vmx_get_interrupt_shadow
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.rflags import kvm_get_rflags
from emufuzz.kvm.state import gpr_of, to_system
from emufuzz.kvm.vcpu import KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, QueuedException, Vcpu
from emufuzz.kvm.x86 import KVM_EXIT_INTERNAL_ERROR, KVM_INTERNAL_ERROR_EMULATION
from emufuzz.subject.flat.ops import read_fpu

_UNHANDLEABLE: Final = "unhandleable"


def outcome_of(case: Case, machine: KvmMachine, devices: Devices, exits: list[dict[str, Any]]) -> Outcome:
    """The machine's state after the exit was handled to its end, before the next event is injected."""
    vcpu, ctxt = machine.vcpu, machine.ctxt
    exception = waiting_fault(vcpu)
    outcome = Outcome(
        case.id,
        tuple(gpr_of(vcpu)),
        kvm_rip_read(vcpu),
        kvm_get_rflags(vcpu),
        _system(case, machine),
        rc=result_of(machine, exits, exception),
        exception=exception,
        restarts=machine.restarts,
        pages=_pages(machine),
    )
    if machine.last_decode is not None:
        _add_instruction(outcome, machine)
    outcome.extra = {
        "exits": exits,
        "device_trace": trace_to_obj(devices.trace),
        "injected": injected(vcpu),
        "interrupt_shadow": vmx_get_interrupt_shadow(vcpu),
    }
    if ctxt.opcode is not None:
        outcome.leaf = ctxt.opcode.leaf
    return outcome


def _system(case: Case, machine: KvmMachine) -> System:
    system = to_system(machine.vcpu, case.system)
    fpu = machine.ctxt.fpu
    return msgspec.structs.replace(system, fpu=read_fpu(fpu)) if fpu.dirty else system


def _pages(machine: KvmMachine) -> dict[int, bytes]:
    """Changed pages, KVM's own ones apart; a page without memory at the start counts as zeros."""
    return {pfn: page for pfn, page in machine.memory.changed_pages().items() if pfn >> 52 == 0}


def _add_instruction(outcome: Outcome, machine: KvmMachine) -> None:
    ctxt = machine.ctxt
    decoded = machine.last_decode == EMULATION_OK
    outcome.decode_rc = "ok" if decoded else "failed"
    outcome.length = ctxt.fetch_pos if decoded else None
    outcome.interruptibility = ctxt.interruptibility
    outcome.reason = ctxt.fail_reason


def result_of(machine: KvmMachine, exits: list[dict[str, Any]], exception: Fault | None) -> str:
    """The result in the words of Outcome.rc."""
    if _retried(machine, exits, exception):
        return X86EMUL_NAMES[X86EMUL_RETRY_INSTR]
    if failed(exits) or machine.ctxt.fail_reason:
        return _UNHANDLEABLE
    rc = machine.ctxt.rc if machine.emulations else X86EMUL_CONTINUE
    if rc == X86EMUL_IO_NEEDED and _answered(machine, exits):
        rc = X86EMUL_CONTINUE
    if rc == X86EMUL_UNHANDLEABLE:
        return _UNHANDLEABLE  # above CPL 0 only #UD tells of it
    if exception is not None and (rc != X86EMUL_CONTINUE or exception[0] != DB_VECTOR):
        return "propagate_fault"
    return X86EMUL_NAMES[rc] if 0 <= rc < len(X86EMUL_NAMES) else _UNHANDLEABLE


def _answered(machine: KvmMachine, exits: list[dict[str, Any]]) -> bool:
    """Userspace was asked for an MSR and KVM has gone on with the answer, which runs no emulator again."""
    return (
        bool(exits)
        and exits[-1]["reason"] in {KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR}
        and machine.vcpu.complete_userspace_io is None
    )


def _retried(machine: KvmMachine, exits: list[dict[str, Any]], exception: Fault | None) -> bool:
    """KVM gave up the shadow of the table that was written, and lets the guest repeat the instruction."""
    if exits or exception is not None or machine.retired or not machine.emulations:
        return False
    return machine.mmu.last_retry_eip == kvm_rip_read(machine.vcpu) != 0


def failed(exits: list[dict[str, Any]]) -> bool:
    """The last exit says that an instruction could not be emulated."""
    last = exits[-1] if exits else {}
    return (
        last.get("reason") == KVM_EXIT_INTERNAL_ERROR and last.get("suberror") == KVM_INTERNAL_ERROR_EMULATION
    )


def waiting_fault(vcpu: Vcpu) -> Fault | None:
    """The exception that waits for the guest or, as L2's that L1 wants, for an exit to L1.

    Either way it is what the instruction raised; L1's comes first (KVM: kvm_check_and_inject_events).
    """
    return queued_fault(vcpu.exception_vmexit) or queued_fault(vcpu.exception)


def queued_fault(queued: QueuedException) -> Fault | None:
    """A queued exception that is still to be delivered."""
    if not queued.pending:
        return None
    return (
        queued.vector,
        queued.error_code if queued.has_error_code else None,
        queued.payload if queued.vector == PF_VECTOR and queued.has_payload else None,
    )


def injected(vcpu: Vcpu) -> list[dict[str, Any]]:
    """Exceptions that are queued for the guest, for L1 first, or in the middle of their delivery."""
    found = []
    for queued in (vcpu.exception_vmexit, vcpu.exception):
        if queued.pending or queued.injected:
            entry: dict[str, Any] = {"vector": queued.vector}
            if queued.has_error_code:
                entry["error_code"] = queued.error_code
            if queued.has_payload:
                entry["payload"] = hex(queued.payload)
            found.append(entry)
    return found
