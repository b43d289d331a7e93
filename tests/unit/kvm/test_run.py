"""KVM_RUN: completions, what keeps the guest from being entered, and how it ends."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.exits import Exited

from emufuzz.case.segments import segment_paragraph
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exceptions import kvm_queue_exception, kvm_queue_interrupt
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.run import GUEST_ENTERED, HALTED, USERSPACE, after_exit, inject_events, kvm_run, vcpu_run
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, KVM_REQ_NMI, KVM_REQ_SMI, KVM_REQ_TRIPLE_FAULT, MP_STATE_HALTED
from emufuzz.kvm.vmx_bits import INTR_INFO_VALID_MASK

RESTRICTED = {"unrestricted_guest": False}
IVT = {0x3000: bytes.fromhex("00700000") * 64}  # every vector goes to 0000:7000
#: A segment as "unreal mode" has it, which virtual-8086 mode does not allow.
BIG = msgspec.structs.replace(segment_paragraph(0), limit=0xFFFFFFFF, g=1)


def invalid(code: str = "40", mode: str = "real", count: int = 1, **kwargs: Any) -> Exited:
    vm = Exited(mode, code, count=count, knobs=RESTRICTED, **kwargs)
    vm.vcpu.emulation_required = True
    vm.vcpu.requests.clear()
    vm.vcpu.trace = Trace()
    return vm


def names(vm: Exited) -> list[str]:
    assert vm.vcpu.trace is not None
    return [event.name for event in vm.vcpu.trace.events]


# -- how it ends -----------------------------------------------------------------------------------


def test_a_valid_state_is_entered() -> None:
    vm = Exited()
    vm.vcpu.trace = Trace()
    assert vcpu_run(vm.machine) == GUEST_ENTERED
    assert names(vm) == ["kvm_entry"]
    assert vm.vcpu.trace.events[0].fields == {"rip": 0x6000, "immediate_exit": False}


@pytest.mark.parametrize("state", ["valid", "invalid"])
def test_a_triple_fault_shuts_down_first(state: str) -> None:
    vm = Exited() if state == "valid" else invalid()
    vm.vcpu.make_request(KVM_REQ_TRIPLE_FAULT)
    vm.machine.mmio.needed = True
    assert vcpu_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.machine.mmio.needed, vm.machine.emulations) == ("SHUTDOWN", False, 0)


def test_a_halted_vcpu_sleeps() -> None:
    vm = Exited()
    vm.vcpu.mp_state = MP_STATE_HALTED
    assert kvm_run(vm.machine) == HALTED


def test_the_signal_comes_when_the_budget_is_used_up() -> None:
    vm = invalid("40" * 9, count=3)
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.reg("rax"), vm.machine.budget) == ("INTR", 3, 0)
    assert names(vm) == ["kvm_emulate_insn"] * 3 + ["kvm_userspace_exit"]


def test_the_budget_may_be_larger_than_a_burst() -> None:
    vm = invalid("40" * 300, count=200)
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.reg("rax")) == ("INTR", 200)


def test_the_guest_is_entered_as_soon_as_its_state_is_valid() -> None:
    vm = invalid("8ed8" + "40", count=9, rax=0x800)  # MOV DS, AX, which looks at the state again
    assert kvm_run(vm.machine) == GUEST_ENTERED
    assert (vm.rip, vm.machine.emulations, vm.machine.budget) == (0x6002, 1, 8)


@pytest.mark.parametrize(("result", "ended"), [(1, GUEST_ENTERED), (0, USERSPACE)])
def test_an_exit_goes_on_or_leaves(result: int, ended: int) -> None:
    vm = Exited()
    vm.vcpu.trace = Trace()
    vm.run.leave("HLT")
    assert after_exit(vm.machine, result) == ended
    assert names(vm) == ["kvm_entry" if result else "kvm_userspace_exit"]


# -- before the loop -------------------------------------------------------------------------------


@pytest.mark.parametrize("injected", [False, True])
def test_an_exception_that_cannot_be_delivered_fails_before_every_run(injected: bool) -> None:
    """It fails as often as it is tried, and changes nothing."""
    vm = invalid(mode="prot32")
    kvm_queue_exception(vm.vcpu, 6)
    vm.vcpu.exception.pending, vm.vcpu.exception.injected = not injected, injected
    for _ in range(2):
        assert kvm_run(vm.machine) == USERSPACE
        assert (vm.run.exit_reason, vm.run.data["suberror"], vm.run.data["flags"]) == ("INTERNAL_ERROR", 1, 0)
        assert (vm.machine.emulations, vm.rip) == (0, 0x6000)


@pytest.mark.parametrize(("result", "ended"), [(1, GUEST_ENTERED), (0, USERSPACE), (-1, USERSPACE)])
def test_a_completion_runs_first_and_once(result: int, ended: int) -> None:
    vm = Exited()
    calls: list[int] = []

    def complete(_vcpu: object) -> int:
        calls.append(len(calls))
        return result

    vm.vcpu.complete_userspace_io = complete
    assert kvm_run(vm.machine) == ended
    assert (calls, vm.vcpu.complete_userspace_io) == ([0], None)
    assert kvm_run(vm.machine) == GUEST_ENTERED
    assert calls == [0]


def test_what_userspace_was_told_is_forgotten() -> None:
    vm = Exited()
    vm.run.leave("IO", port=1)
    assert kvm_run(vm.machine) == GUEST_ENTERED
    assert (vm.run.exit_reason, vm.run.data) == ("UNKNOWN", {})


# -- events ----------------------------------------------------------------------------------------


def test_an_exception_of_real_mode_is_delivered_once() -> None:
    """Delivery through the IVT asks for another look at events, so the entry is cancelled."""
    vm = invalid("40", data=IVT | {0x7000: b"\x43"}, rsp=0xC800, es=BIG)
    kvm_queue_exception(vm.vcpu, 0)
    assert kvm_run(vm.machine) == USERSPACE
    assert vm.run.exit_reason == "INTR"
    assert (vm.reg("rsp"), vm.rip, vm.reg("rbx"), vm.reg("rax")) == (0xC7FA, 0x7001, 1, 0)
    assert vm.pending is None
    assert not vm.vcpu.exception.injected


def test_events_are_delivered_one_after_the_other() -> None:
    vm = invalid("40", data=IVT | {0x7000: b"\x43"}, rsp=0xC800, es=BIG)
    vm.vcpu.nmi_pending = 1
    kvm_queue_exception(vm.vcpu, 0)
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.reg("rsp"), vm.vcpu.nmi_pending, vm.vcpu.nmi_injected) == (0xC7F4, 0, False)


def test_an_nmi_that_was_only_requested_becomes_pending() -> None:
    vm = invalid("40", data=IVT | {0x7000: b"\x43"}, rsp=0xC800, es=BIG)
    vm.vcpu.nmi_queued = 1
    vm.vcpu.make_request(KVM_REQ_NMI)
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.reg("rsp"), vm.reg("rbx")) == (0xC7FA, 1)


def test_an_ivt_that_cannot_be_read_is_a_triple_fault() -> None:
    vm = invalid("40")  # there is no page for it
    kvm_queue_exception(vm.vcpu, 0)
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.rip) == ("SHUTDOWN", 0x6000)


@pytest.mark.parametrize(("requests", "goes_on"), [((), True), ((KVM_REQ_EVENT,), True)])
def test_without_an_event_the_entry_goes_on(requests: tuple[str, ...], goes_on: bool) -> None:
    vcpu = invalid().vcpu
    vcpu.requests |= set(requests)
    assert inject_events(vcpu) is goes_on
    assert not vcpu.requests


def test_what_hardware_would_have_to_deliver_stays_in_the_entry_fields() -> None:
    vm = invalid(mode="prot32")
    kvm_queue_interrupt(vm.vcpu, 0x20, soft=False)
    vm.vcpu.make_request(KVM_REQ_EVENT)
    assert inject_events(vm.vcpu)
    assert vm.field(vf.VM_ENTRY_INTR_INFO_FIELD) == INTR_INFO_VALID_MASK | 0x20


def test_an_event_behind_another_one_goes_round_until_a_signal_comes() -> None:
    vm = invalid(mode="prot32", count=5)
    kvm_queue_interrupt(vm.vcpu, 0x20, soft=False)
    vm.vcpu.nmi_pending = 1
    vm.vcpu.make_request(KVM_REQ_EVENT)
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.machine.emulations) == ("INTR", 0)


def test_an_exit_that_asks_userspace_ends_the_loop() -> None:
    vm = invalid("e460")
    assert kvm_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.vcpu.exit_reason) == (
        "IO", er.VMX_EXIT_REASONS_FAILED_VMENTRY | er.EXIT_REASON_INVALID_STATE,
    )  # fmt: skip


# -- SMIs ------------------------------------------------------------------------------------------

SMRAM = {0x38000: b"\x90\xf4", 0x3F000: b""}


def with_smi(**kwargs: Any) -> Exited:
    vm = invalid(code="90", data={**IVT, **SMRAM}, **kwargs)
    vm.machine.memory.share_with_smm()
    vm.vcpu.make_request(KVM_REQ_SMI)
    return vm


def test_an_smi_is_served_before_an_entry() -> None:
    vm = with_smi()
    assert not inject_events(vm.vcpu)  # loading RFLAGS asks for another look at events
    assert (vm.vcpu.smm, vm.vcpu.smi_pending, kvm_rip_read(vm.vcpu)) == (True, False, 0x8000)
    saved = vm.machine.mmu.slots.read_guest(0x3FF78, 8)
    assert saved == (0x6000).to_bytes(8, "little")
    assert inject_events(vm.vcpu)


def test_an_smi_waits_in_smm_and_behind_an_exception() -> None:
    vm = with_smi()
    vm.vcpu.smm = True
    inject_events(vm.vcpu)
    assert (vm.vcpu.smi_pending, kvm_rip_read(vm.vcpu)) == (True, 0x6000)
    vm = with_smi()
    kvm_queue_exception(vm.vcpu, 6)
    inject_events(vm.vcpu)
    assert (vm.vcpu.smi_pending, vm.vcpu.smm, kvm_rip_read(vm.vcpu)) == (True, False, 0x7000)
    inject_events(vm.vcpu)
    assert (vm.vcpu.smi_pending, vm.vcpu.smm) == (False, True)


def test_an_smi_without_memory_for_the_state_ends_the_vm() -> None:
    vm = invalid(code="90", data=IVT)
    vm.machine.memory.share_with_smm()
    vm.vcpu.make_request(KVM_REQ_SMI)
    assert vcpu_run(vm.machine) == USERSPACE
    assert (vm.run.exit_reason, vm.machine.emulations) == ("UNKNOWN", 0)
