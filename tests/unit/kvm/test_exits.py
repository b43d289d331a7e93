"""What comes before every exit handler, and that no exit goes without one."""

from __future__ import annotations

import pytest
from support.exits import UD, Exited, event, hard

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exits import KVM_VMX_EXIT_HANDLERS, vmx_handle_exit
from emufuzz.kvm.fastpath import EXIT_FASTPATH_EXIT_HANDLED, EXIT_FASTPATH_EXIT_USERSPACE
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.vmx_bits import (
    GUEST_INTR_STATE_NMI,
    GUEST_INTR_STATE_STI,
    INTR_TYPE_EXT_INTR,
    INTR_TYPE_NMI_INTR,
)

NO_HANDLER = sorted(set(range(80)) - set(KVM_VMX_EXIT_HANDLERS))
#: Exits that may come while an event is delivered.
DURING_DELIVERY = (
    er.EXIT_REASON_EXCEPTION_NMI, er.EXIT_REASON_TASK_SWITCH, er.EXIT_REASON_APIC_ACCESS,
    er.EXIT_REASON_EPT_VIOLATION, er.EXIT_REASON_PML_FULL, er.EXIT_REASON_NOTIFY,
)  # fmt: skip
FAILED = er.VMX_EXIT_REASONS_FAILED_VMENTRY
RESTRICTED = {"unrestricted_guest": False}


@pytest.mark.parametrize("reason", NO_HANDLER)
def test_a_reason_without_handler_is_reported_to_userspace(reason: int) -> None:
    vm = Exited()
    assert vm.exit(reason) == 0
    assert vm.run.exit_reason == "INTERNAL_ERROR"
    assert vm.run.data == {"suberror": 4, "data": [reason, 0]}


@pytest.mark.parametrize("reason", [33, 34, 41])
def test_a_failed_entry_is_reported_with_its_whole_reason(reason: int) -> None:
    vm = Exited()
    assert vm.exit(reason, full_reason=FAILED | reason) == 0
    assert vm.run.exit_reason == "FAIL_ENTRY"
    assert vm.run.data == {"hardware_entry_failure_reason": FAILED | reason, "cpu": 0}


@pytest.mark.parametrize("reason", [FAILED | 33, er.EXIT_REASON_CPUID])
def test_a_state_that_cannot_be_entered_is_emulated_before_anything_else(reason: int) -> None:
    vm = Exited("real", "40", knobs=RESTRICTED, count=1)
    vm.vcpu.emulation_required = True
    vm.vcpu.vmcs.hw_write(vf.IDT_VECTORING_INFO_FIELD, hard(6))
    vm.vcpu.exit_reason = reason
    assert vmx_handle_exit(vm.machine) == 1
    assert (vm.reg("rax"), vm.rip, vm.machine.emulations) == (1, 0x6001, 1)


def test_a_nested_guest_in_such_a_state_is_a_triple_fault_for_l1() -> None:
    vm = Exited(kvm={"guest_mode": True})
    vm.vcpu.emulation_required = True
    assert vmx_handle_exit(vm.machine) == 0
    assert (vm.run.exit_reason, vm.run.data) == ("NESTED_VMEXIT", {"vmexit_reason": 2})


def test_a_nested_guest_does_not_log_dirty_pages() -> None:
    vm = Exited(kvm={"guest_mode": True})
    assert vm.exit(er.EXIT_REASON_PML_FULL) == 0
    assert vm.run.data == {"suberror": 4, "data": [er.EXIT_REASON_PML_FULL, 0]}


@pytest.mark.parametrize("reason", sorted(set(KVM_VMX_EXIT_HANDLERS) - set(DURING_DELIVERY)))
def test_an_exit_during_the_delivery_of_an_event_is_fatal(reason: int) -> None:
    vm = Exited()
    assert vm.exit(reason, 0x123, vectoring_info=hard(6), guest_physical_address=0xABC000) == 0
    data = [hard(6), reason, 0x123, *([0xABC000] if reason == er.EXIT_REASON_EPT_MISCONFIG else []), 0]
    assert vm.run.exit_reason == "INTERNAL_ERROR"
    assert vm.run.data == {"suberror": 3, "data": data}


@pytest.mark.parametrize("reason", DURING_DELIVERY)
def test_exits_that_may_come_during_a_delivery(reason: int) -> None:
    vm = Exited(data={0xB000: b""}, kvm={})
    info = 0x80000000 | 3 << 8 | 14  # an exception within a delivery: a plain #PF
    vm.exit(reason, 0x181, vectoring_info=event(INTR_TYPE_EXT_INTR, 0x20), intr_info=info)
    assert vm.run.data.get("suberror") != 3
    interrupted = vm.vcpu.interrupt
    assert reason == er.EXIT_REASON_TASK_SWITCH or (interrupted.injected, interrupted.nr) == (True, 0x20)


def test_a_vectoring_field_that_is_not_valid_means_nothing() -> None:
    vm = Exited(code="0fa2")
    assert vm.exit(er.EXIT_REASON_CPUID, length=2, vectoring_info=0x306) == 1
    assert vm.rip == 0x6002


@pytest.mark.parametrize(
    ("knobs", "rflags", "state", "blocked"),
    [
        ({"vnmi": False}, 0x202, 0, False),  # interrupts are open, so the NMI handler has ended
        ({"vnmi": False}, 0x2, 0, True),
        ({"vnmi": False}, 0x202, GUEST_INTR_STATE_STI, True),
        ({"vnmi": True}, 0x202, 0, True),  # the flag is not used
    ],
)
def test_without_virtual_nmis_the_end_of_the_handler_is_guessed(
    knobs: dict[str, bool], rflags: int, state: int, blocked: bool
) -> None:
    vm = Exited(knobs=knobs, flags=rflags, kvm={"interruptibility": state})
    vm.vcpu.soft_vnmi_blocked = True
    assert vm.exit(er.EXIT_REASON_EXTERNAL_INTERRUPT) == 1
    assert vm.vcpu.soft_vnmi_blocked is blocked


def test_what_the_fastpath_has_done_is_not_done_again() -> None:
    vm = Exited()
    vm.vcpu.exit_reason = er.EXIT_REASON_TRIPLE_FAULT
    assert vmx_handle_exit(vm.machine, EXIT_FASTPATH_EXIT_HANDLED) == 1
    assert vmx_handle_exit(vm.machine, EXIT_FASTPATH_EXIT_USERSPACE) == 0
    assert vm.run.exit_reason == "UNKNOWN"


def test_a_bus_lock_goes_to_userspace_after_the_handler() -> None:
    vm = Exited(code="0fa2")
    reason = er.VMX_EXIT_REASONS_BUS_LOCK_DETECTED | er.EXIT_REASON_CPUID
    assert vm.exit(er.EXIT_REASON_CPUID, length=2, full_reason=reason) == 0
    assert vm.run.exit_reason == "X86_BUS_LOCK"
    assert vm.rip == 0x6002


def test_a_bus_lock_does_not_hide_why_the_handler_leaves() -> None:
    vm = Exited()
    reason = er.VMX_EXIT_REASONS_BUS_LOCK_DETECTED | er.EXIT_REASON_TRIPLE_FAULT
    assert vm.exit(er.EXIT_REASON_TRIPLE_FAULT, full_reason=reason) == 0
    assert vm.run.exit_reason == "SHUTDOWN"


def test_code_of_an_enclave_is_not_emulated() -> None:
    vm = Exited(code="6c")
    reason = er.VMX_EXIT_REASONS_ENCLAVE_MODE | er.EXIT_REASON_IO_INSTRUCTION
    assert vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 1 << 4, full_reason=reason) == 1
    assert vm.pending == UD
    assert vm.rip == 0x6000


@pytest.mark.parametrize(
    ("bits", "vectoring", "vnmi", "state"),
    [
        (0x1000, 0, True, GUEST_INTR_STATE_NMI),
        (0, 0, True, 0),
        (0x1000, event(INTR_TYPE_NMI_INTR, 2), True, 0),  # then the bit means nothing
        (0x1000, 0, False, 0),
    ],
)
def test_a_fault_of_iret_blocks_nmis_again(bits: int, vectoring: int, vnmi: bool, state: int) -> None:
    vm = Exited(knobs={"vnmi": vnmi, "ept": False})
    vm.exit(0, 0xB000, intr_info=hard(14) | bits, vectoring_info=vectoring)
    assert vm.interruptibility & GUEST_INTR_STATE_NMI == state


@pytest.mark.parametrize(("vector", "blocked"), [(8, False), (10, True)])
def test_the_bit_means_nothing_for_a_double_fault(vector: int, blocked: bool) -> None:
    vm = Exited()
    vm.exit(0, intr_info=hard(vector) | 0x1000)
    assert bool(vm.interruptibility & GUEST_INTR_STATE_NMI) is blocked
    assert vm.vcpu.nmi_known_unmasked is not blocked


def test_a_blocking_that_is_known_to_be_off_is_not_looked_up() -> None:
    vm = Exited()
    vm.vcpu.nmi_known_unmasked = True
    vm.exit(0, intr_info=hard(10) | 0x1000)
    assert not vm.interruptibility & GUEST_INTR_STATE_NMI


def test_the_handler_itself_traces_no_exit() -> None:
    """The tracepoint is in what runs the guest, so a state that was never entered has none."""
    vm = Exited("real", "40", knobs=RESTRICTED)
    vm.vcpu.trace = Trace()
    vm.vcpu.emulation_required = True
    vmx_handle_exit(vm.machine)
    assert [item.name for item in vm.vcpu.trace.events] == ["kvm_emulate_insn"]
