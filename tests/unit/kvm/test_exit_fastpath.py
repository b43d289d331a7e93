from __future__ import annotations

from typing import Any

import pytest
from support.handler_cases import exit_case

from emufuzz.case.model import Case
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.exit_fastpath import vmx_exit_handlers_fastpath
from emufuzz.kvm.exit_info import FAILED_VMENTRY
from emufuzz.kvm.exits import handle_hardware_exit
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, MP_STATE_HALTED, MP_STATE_RUNNABLE
from emufuzz.subject.kvm.build import build_machine
from emufuzz.subject.kvm.enter import ExitInfo, hardware_exit

RIP = 0x6010
X2APIC = {0x1B: 0xFEE00C00}
APIC = {"irqchip": True}


def exited(case: Case, reason: int, kvm: dict[str, Any] | None = None) -> KvmMachine:
    """A machine right after an exit of two bytes."""
    machine, _ = build_machine(case, {})
    hardware_exit(machine, ExitInfo(reason, length=2), kvm or {})
    return machine


def halt(**kwargs: Any) -> KvmMachine:
    return exited(exit_case("f4", **kwargs), er.EXIT_REASON_HLT)


def deadline(**kwargs: Any) -> KvmMachine:
    return exited(exit_case("0f30", rcx=0x6E0, **kwargs), er.EXIT_REASON_MSR_WRITE)


def test_hlt_without_an_apic_is_userspaces():
    machine = halt()
    assert vmx_exit_handlers_fastpath(machine) == "EXIT_USERSPACE"
    assert machine.vcpu.run.exit_reason == "HLT"
    assert kvm_rip_read(machine.vcpu) == RIP + 2


def test_hlt_with_an_apic_sleeps_on_the_slow_path():
    machine = halt(knobs=APIC)
    assert vmx_exit_handlers_fastpath(machine) == "EXIT_HANDLED"
    assert machine.vcpu.mp_state == MP_STATE_HALTED


def test_hlt_with_something_to_do_goes_on_at_once():
    pending = {0xF0: 0x1FF, 0x220: 2}
    machine = halt(knobs=APIC, kvm={"lapic": pending}, flags=0x200)
    assert vmx_exit_handlers_fastpath(machine) == "REENTER_GUEST"
    assert machine.vcpu.mp_state == MP_STATE_RUNNABLE


def test_wrmsr_that_the_fastpath_knows():
    machine = deadline()
    assert vmx_exit_handlers_fastpath(machine) == "REENTER_GUEST"
    assert kvm_rip_read(machine.vcpu) == RIP + 2
    assert 0x6E0 in machine.vcpu.msrs_written


def test_wrmsr_that_it_does_not_know():
    machine = exited(exit_case("0f30", rcx=0xC0000082), er.EXIT_REASON_MSR_WRITE)
    assert vmx_exit_handlers_fastpath(machine) == "NONE"
    assert kvm_rip_read(machine.vcpu) == RIP


def test_the_preemption_timer_enters_again():
    machine = exited(exit_case("90"), er.EXIT_REASON_PREEMPTION_TIMER)
    assert vmx_exit_handlers_fastpath(machine) == "REENTER_GUEST"


@pytest.mark.parametrize("reason", [er.EXIT_REASON_CPUID, er.EXIT_REASON_MSR_READ, er.EXIT_REASON_VMCALL])
def test_other_exits_have_no_fastpath(reason):
    assert vmx_exit_handlers_fastpath(exited(exit_case("0fa2"), reason)) == "NONE"


def test_a_nested_guest_has_none():
    assert vmx_exit_handlers_fastpath(halt(kvm={"guest_mode": True})) == "NONE"
    assert vmx_exit_handlers_fastpath(deadline(kvm={"guest_mode": True})) == "NONE"


def test_a_failed_entry_has_none():
    machine = deadline()
    machine.vcpu.exit_reason |= FAILED_VMENTRY
    assert vmx_exit_handlers_fastpath(machine) == "NONE"


# -- what follows it -----------------------------------------------------------------------------


def test_an_exit_is_traced_once_and_before_its_fastpath():
    machine = deadline()
    machine.vcpu.trace = Trace()
    assert handle_hardware_exit(machine) == 1
    assert [event.name for event in machine.vcpu.trace.events] == ["kvm_exit", "kvm_msr"]


def test_an_exit_without_fastpath_is_traced_once():
    machine = exited(exit_case("0fa2"), er.EXIT_REASON_CPUID)
    machine.vcpu.trace = Trace()
    assert handle_hardware_exit(machine) == 1
    assert [event.name for event in machine.vcpu.trace.events] == ["kvm_exit", "kvm_cpuid"]


def test_a_reentry_skips_what_every_exit_is_checked_for():
    machine = exited(exit_case("0f30", rcx=0x6E0), er.EXIT_REASON_MSR_WRITE, {"vectoring_info": 0x80000020})
    machine.vcpu.requests.clear()
    assert handle_hardware_exit(machine) == 1


def test_a_pending_request_sends_it_the_slow_way():
    machine = exited(exit_case("0f30", rcx=0x6E0), er.EXIT_REASON_MSR_WRITE, {"vectoring_info": 0x80000020})
    machine.vcpu.make_request(KVM_REQ_EVENT)
    assert handle_hardware_exit(machine) == 0
    assert machine.vcpu.run.exit_reason == "INTERNAL_ERROR"
    assert kvm_rip_read(machine.vcpu) == RIP + 2


def test_userspaces_exits_skip_them_too():
    machine = exited(exit_case("f4"), er.EXIT_REASON_HLT, {"vectoring_info": 0x80000020})
    assert handle_hardware_exit(machine) == 0
    assert machine.vcpu.run.exit_reason == "HLT"
