"""Exits about events: task switches, invalid guest state, windows, the virtual APIC, shutdown, notify."""

from __future__ import annotations

import struct
from typing import Any

import pytest
from support.exits import Exited, event, hard

from emufuzz.case.model import TableRegister
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exit_event import INVALID_STATE_BURST, emulation_required_with_pending_exception
from emufuzz.kvm.exits import vmx_handle_exit
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, MP_STATE_HALTED
from emufuzz.kvm.vmx_bits import (
    CPU_BASED_INTR_WINDOW_EXITING,
    CPU_BASED_NMI_WINDOW_EXITING,
    GUEST_INTR_STATE_NMI,
    INTR_TYPE_EXT_INTR,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_NMI_INTR,
    INTR_TYPE_SOFT_EXCEPTION,
    INTR_TYPE_SOFT_INTR,
)

RESTRICTED = {"unrestricted_guest": False}
IRQCHIP = {"irqchip": True}
APIC_ON = {0xF0: 0x1FF}

# -- task switches ---------------------------------------------------------------------------------

TASK, TASK_BASE, ENTRY = 0x78, 0x5000, 0x7000
CALL, IRET, JMP, GATE = (reason << 30 for reason in range(4))


def new_task(cs: int = 0x08, esp: int = 0xC400) -> bytes:
    """A 32-bit TSS (SDM Vol. 3A Figure 7-2) that goes on at ENTRY."""
    words = [0, 0, 0, 0, 0, 0, 0, 0x100000, ENTRY, 2, *range(8), 0x28, cs, 0x28, 0x28, 0x28, 0x28, 0, 0]
    words[14] = esp
    return struct.pack("<26I", *words)


def task_vm(code: str = "9a000000007800", descriptor: str = "6700005000890000", **kwargs: Any) -> Exited:
    data = {0x1000 + TASK: bytes.fromhex(descriptor), TASK_BASE: kwargs.pop("tss", new_task())}
    idt = {0x3000 + 8 * 0x21: bytes.fromhex("0000780000e50000")}  # a task gate for vector 21h
    return Exited("prot32", code, gdtr=TableRegister(0x1000, 0xFFF), data={**data, **idt}, **kwargs)


def pushed(vm: Exited, size: int = 4) -> int:
    data = vm.machine.memory.spaces[0].read_guest(vm.reg("rsp"), size)
    assert data is not None
    return int.from_bytes(data, "little")


@pytest.mark.parametrize("reason", [CALL, JMP])
def test_the_old_task_goes_on_behind_the_instruction(reason: int) -> None:
    vm = task_vm()
    assert vm.exit(er.EXIT_REASON_TASK_SWITCH, reason | TASK, length=7) == 1
    assert (vm.rip, vm.pending, vm.machine.emulations) == (ENTRY, None, 1)
    assert [vm.reg(name) for name in ("rax", "rcx", "rdx", "rbx")] == [0, 1, 2, 3]
    old = vm.machine.memory.spaces[0].read_guest(0x4020, 4)
    assert old == (0x6007).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("kind", "vector", "more", "skips"),
    [
        (INTR_TYPE_EXT_INTR, 0x21, 0, False),
        (INTR_TYPE_NMI_INTR, 2, 0, False),
        (INTR_TYPE_HARD_EXCEPTION, 6, 0, False),
        (INTR_TYPE_SOFT_INTR, 0x21, 0, True),
        (INTR_TYPE_SOFT_EXCEPTION, 3, 0, True),
    ],
)
def test_what_came_through_a_task_gate_counts_as_delivered(
    kind: int, vector: int, more: int, skips: bool
) -> None:
    vm = task_vm("cd21")
    info = event(kind, vector, more)
    assert vm.exit(er.EXIT_REASON_TASK_SWITCH, GATE | TASK, length=2, vectoring_info=info) == 1
    vcpu = vm.vcpu
    assert (vcpu.exception.injected, vcpu.interrupt.injected, vcpu.nmi_injected) == (False, False, False)
    assert bool(vm.interruptibility & GUEST_INTR_STATE_NMI) is (kind == INTR_TYPE_NMI_INTR)
    old = vm.machine.memory.spaces[0].read_guest(0x4020, 4)
    assert old == (0x6002 if skips else 0x6000).to_bytes(4, "little")
    assert vm.rip == ENTRY


def test_the_error_code_is_pushed_onto_the_new_stack() -> None:
    vm = task_vm("90")
    info = hard(13) | 1 << 11
    vm.exit(er.EXIT_REASON_TASK_SWITCH, GATE | TASK, vectoring_info=info, vectoring_error_code=0x18)
    assert (vm.rip, vm.reg("rsp"), pushed(vm)) == (ENTRY, 0xC3FC, 0x18)


@pytest.mark.parametrize("reason", [CALL, IRET, JMP])
def test_an_event_stays_queued_if_no_gate_was_its_way(reason: int) -> None:
    vm = task_vm("90")
    vm.exit(er.EXIT_REASON_TASK_SWITCH, reason | TASK, vectoring_info=event(INTR_TYPE_EXT_INTR, 0x21))
    assert vm.vcpu.interrupt.injected


def test_an_unknown_kind_of_event_is_left_alone() -> None:
    vm = task_vm("90")
    assert vm.exit(er.EXIT_REASON_TASK_SWITCH, GATE | TASK, length=1, vectoring_info=event(7 << 8, 0)) == 1
    assert vm.rip == ENTRY


def test_a_fault_of_the_switch_is_lost() -> None:
    """What has changed until then stays, and the guest goes on behind the instruction of the old task."""
    vm = task_vm(tss=new_task(cs=0x28), flags=0x40)  # a data segment in CS
    assert vm.exit(er.EXIT_REASON_TASK_SWITCH, JMP | TASK, length=7) == 1
    assert vm.pending is None
    assert (vm.rip, vm.reg("rcx"), vm.flags) == (0x6007, 0, 2)  # RFLAGS is the new task's, GPRs are not
    assert vm.machine.memory.spaces[0].read_guest(0x4020, 4) == (0x6007).to_bytes(4, "little")


def test_a_stack_in_a_device_is_an_emulation_failure() -> None:
    device = [{"kind": "mmio", "addr": "0xe000", "size": 4096}]
    vm = task_vm("90", tss=new_task(esp=0xE400), devices=device)
    info = hard(13) | 1 << 11
    assert (
        vm.exit(er.EXIT_REASON_TASK_SWITCH, GATE | TASK, vectoring_info=info, vectoring_error_code=0x18) == 0
    )
    assert vm.run.exit_reason == "INTERNAL_ERROR"
    assert vm.run.data == {"suberror": 1, "data": []}
    assert (vm.rip, vm.machine.mmio.needed) == (0x6000, False)


# -- invalid guest state ---------------------------------------------------------------------------


def invalid(code: str, count: int = 1, mode: str = "real", **kwargs: Any) -> Exited:
    """A guest in real mode with a segment that virtual-8086 mode does not allow."""
    vm = Exited(mode, code, count=count, knobs=RESTRICTED | kwargs.pop("knobs", {}), **kwargs)
    vm.vcpu.emulation_required = True
    vm.vcpu.requests.clear()
    return vm


def test_instructions_are_emulated_up_to_the_budget() -> None:
    vm = invalid("40" * 5, count=3)
    assert vmx_handle_exit(vm.machine) == 1
    assert (vm.reg("rax"), vm.machine.budget, vm.machine.emulations) == (3, 0, 3)


def test_no_more_than_a_burst_is_emulated() -> None:
    vm = invalid("40" * 200, count=200)
    assert vmx_handle_exit(vm.machine) == 1
    assert vm.machine.emulations == INVALID_STATE_BURST


def test_the_loop_ends_when_the_state_is_valid() -> None:
    vm = Exited("real", "8ed8" + "40" * 3, count=9, knobs=RESTRICTED, rax=0x800)  # MOV DS, AX
    vm.vcpu.emulation_required = True
    vm.vcpu.requests.clear()
    assert vmx_handle_exit(vm.machine) == 1
    assert (vm.machine.emulations, vm.vcpu.emulation_required, vm.rip) == (1, False, 0x6002)


def test_an_interrupt_window_is_seen() -> None:
    vm = invalid("40", flags=0x200)
    vm.vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_INTR_WINDOW_EXITING)
    assert vmx_handle_exit(vm.machine) == 1
    assert (vm.machine.emulations, KVM_REQ_EVENT in vm.vcpu.requests) == (0, True)
    assert not vm.field(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_INTR_WINDOW_EXITING


def test_a_window_that_is_closed_waits() -> None:
    vm = invalid("40", flags=0)
    vm.vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_INTR_WINDOW_EXITING)
    assert vmx_handle_exit(vm.machine) == 1
    assert vm.machine.emulations == 1


def test_events_go_first() -> None:
    vm = invalid("40")
    vm.vcpu.make_request(KVM_REQ_EVENT)
    assert vmx_handle_exit(vm.machine) == 1
    assert (vm.machine.emulations, KVM_REQ_EVENT in vm.vcpu.requests) == (0, True)


@pytest.mark.parametrize(("knobs", "result"), [({}, 0), (IRQCHIP, 1)])
def test_hlt_ends_the_loop(knobs: dict[str, bool], result: int) -> None:
    vm = invalid("f440", count=5, knobs=knobs)
    assert vmx_handle_exit(vm.machine) == result
    assert (vm.machine.emulations, vm.vcpu.halt_request, vm.rip) == (1, False, 0x6001)
    assert (vm.run.exit_reason == "HLT") is not result
    assert (vm.vcpu.mp_state == MP_STATE_HALTED) is bool(result)


def test_userspace_may_be_needed() -> None:
    vm = invalid("e460")
    assert vmx_handle_exit(vm.machine) == 0
    assert vm.run.exit_reason == "IO"


def test_an_exception_of_a_state_without_stand_in_is_a_failure() -> None:
    vm = invalid("0f0b", mode="prot32", cpl=3)  # UD2
    assert vmx_handle_exit(vm.machine) == 0
    assert (vm.run.exit_reason, vm.run.data["suberror"], vm.run.data["flags"]) == ("INTERNAL_ERROR", 1, 0)
    assert vm.pending is not None


@pytest.mark.parametrize(
    ("required", "stand_in", "pending", "injected", "failure"),
    [
        (True, False, True, False, True),
        (True, False, False, True, True),
        (True, False, False, False, False),
        (True, True, True, False, False),
        (False, False, True, False, False),
    ],
)
def test_when_an_exception_cannot_be_delivered(
    required: bool, stand_in: bool, pending: bool, injected: bool, failure: bool
) -> None:
    vcpu = Exited().vcpu
    vcpu.emulation_required, vcpu.rmode.vm86_active = required, stand_in
    vcpu.exception.pending, vcpu.exception.injected = pending, injected
    assert emulation_required_with_pending_exception(vcpu) is failure


# -- windows, shutdown and what only resumes -------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "control"),
    [
        (er.EXIT_REASON_INTERRUPT_WINDOW, CPU_BASED_INTR_WINDOW_EXITING),
        (er.EXIT_REASON_NMI_WINDOW, CPU_BASED_NMI_WINDOW_EXITING),
    ],
)
def test_a_window_closes_and_asks_for_events(reason: int, control: int) -> None:
    vm = Exited()
    vm.vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, control)
    assert vm.exit(reason) == 1
    assert not vm.field(vf.CPU_BASED_VM_EXEC_CONTROL) & control
    assert KVM_REQ_EVENT in vm.vcpu.requests


def test_a_triple_fault_shuts_down() -> None:
    vm = Exited()
    vm.machine.mmio.needed = True
    assert vm.exit(er.EXIT_REASON_TRIPLE_FAULT) == 0
    assert (vm.run.exit_reason, vm.machine.mmio.needed) == ("SHUTDOWN", False)


RESUMES = (
    er.EXIT_REASON_EXTERNAL_INTERRUPT, er.EXIT_REASON_MONITOR_TRAP_FLAG, er.EXIT_REASON_MCE_DURING_VMENTRY,
    er.EXIT_REASON_PREEMPTION_TIMER, er.EXIT_REASON_TPR_BELOW_THRESHOLD, er.EXIT_REASON_EOI_INDUCED,
    er.EXIT_REASON_APIC_WRITE, er.EXIT_REASON_PML_FULL,
)  # fmt: skip


@pytest.mark.parametrize("reason", RESUMES)
def test_exits_that_are_the_hosts_resume_the_guest_where_it_was(reason: int) -> None:
    vm = Exited(flags=0x100)
    assert vm.exit(reason) == 1
    assert (vm.rip, vm.pending, vm.machine.emulations, vm.run.exit_reason) == (0x6000, None, 0, "UNKNOWN")


def test_a_bus_lock_leaves() -> None:
    vm = Exited()
    assert vm.exit(er.EXIT_REASON_BUS_LOCK) == 0
    assert vm.run.exit_reason == "X86_BUS_LOCK"


@pytest.mark.parametrize(
    ("qualification", "vnmi", "blocked", "left"),
    [
        (0, True, False, False),
        (1 << 12, True, True, False),
        (1 << 12, False, False, False),
        (1, True, False, True),
    ],
)
def test_notify(qualification: int, vnmi: bool, blocked: bool, left: bool) -> None:
    vm = Exited(knobs={"vnmi": vnmi})
    assert vm.exit(er.EXIT_REASON_NOTIFY, qualification) == (not left)
    assert bool(vm.interruptibility & GUEST_INTR_STATE_NMI) is blocked
    if left:
        assert (vm.run.exit_reason, vm.run.data) == ("NOTIFY", {"flags": 1})


# -- the virtual APIC ------------------------------------------------------------------------------


def test_a_priority_that_sank_is_recomputed() -> None:
    vm = Exited(
        knobs=IRQCHIP, kvm={"lapic": APIC_ON | {0x80: 0x40, 0x200: 0, 0x210: 1 << 16}}
    )  # vector 30h waits
    apic = vm.vcpu.apic
    assert apic is not None
    apic.regs[0x80] = 0x20
    vm.vcpu.requests.clear()
    assert vm.exit(er.EXIT_REASON_TPR_BELOW_THRESHOLD) == 1
    assert apic.regs[0xA0] == 0x20
    assert KVM_REQ_EVENT in vm.vcpu.requests


def test_an_eoi_that_hardware_has_done_is_only_passed_on() -> None:
    vm = Exited(knobs=IRQCHIP | {"enable_apicv": True}, kvm={"lapic": APIC_ON})
    vm.vcpu.requests.clear()
    assert vm.exit(er.EXIT_REASON_EOI_INDUCED, 0x31) == 1
    assert (vm.rip, KVM_REQ_EVENT in vm.vcpu.requests) == (0x6000, True)


def test_a_register_that_hardware_has_stored_takes_effect() -> None:
    vm = Exited(
        knobs=IRQCHIP | {"enable_apicv": True}, kvm={"lapic": APIC_ON | {0x300: 0x40030}}
    )  # to itself
    apic = vm.vcpu.apic
    assert apic is not None
    assert vm.exit(er.EXIT_REASON_APIC_WRITE, 0x300) == 1
    assert int.from_bytes(apic.regs[0x210:0x214], "little") == 1 << 16
    assert vm.rip == 0x6000
