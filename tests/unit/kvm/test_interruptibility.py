"""Shadows of STI and MOV SS, and skipping an instruction."""

from __future__ import annotations

import pytest
from support.vcpus import Hooks, make_vcpu

from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exceptions import kvm_queue_exception, kvm_queue_exception_p
from emufuzz.kvm.interruptibility import (
    kvm_skip_emulated_instruction,
    skip_emulated_instruction,
    toggle_interruptibility,
    vmx_get_interrupt_shadow,
    vmx_set_interrupt_shadow,
    vmx_update_emulated_instruction,
)
from emufuzz.kvm.regs import kvm_rip_read, kvm_rip_write

MOV_SS, STI = 1, 2
NMI = 8
TF = 1 << 8


@pytest.mark.parametrize(
    ("mask", "state", "shadow"),
    [(0, 0, 0), (STI, 1, STI), (MOV_SS, 2, MOV_SS), (STI | MOV_SS, 2, MOV_SS)],
)
def test_shadow(mask, state, shadow):
    vcpu = make_vcpu(kvm={"interruptibility": NMI | 1})
    vmx_set_interrupt_shadow(vcpu, mask)
    assert vcpu.vmcs.read(vf.GUEST_INTERRUPTIBILITY_INFO) == NMI | state
    assert vmx_get_interrupt_shadow(vcpu) == shadow


@pytest.mark.parametrize(
    ("before", "mask", "after", "event"),
    [
        (0, 0, 0, False),
        (0, STI, STI, False),
        (STI, STI, 0, True),
        (STI, 0, 0, True),
        (STI, MOV_SS, MOV_SS, False),
        (MOV_SS, MOV_SS, 0, True),
        (MOV_SS, STI, STI, False),
    ],
)
def test_toggle(before, mask, after, event):
    vcpu = make_vcpu()
    vmx_set_interrupt_shadow(vcpu, before)
    toggle_interruptibility(vcpu, mask)
    assert vmx_get_interrupt_shadow(vcpu) == after
    assert ("EVENT" in vcpu.requests) is event


@pytest.mark.parametrize(
    ("mode", "rip", "length", "after"),
    [
        ("prot32", 0x1000, 3, 0x1003),
        ("prot32", 0x1000, 0, 0x1000),
        ("prot32", 0xFFFFFFFE, 3, 1),
        ("prot64", 0xFFFFFFFE, 3, 0x100000001),
        ("prot32", 0x7FFFFFFE, 3, 0x80000001),
        ("prot32", 0x1_FFFFFFFE, 3, 0x2_00000001),  # carries on beyond bit 32: not cut
        ("real", 0xFFFF, 2, 0x10001),
        ("prot64", 0xFFFFFFFFFFFFFFFE, 3, 1),
    ],
)
def test_skip(mode, rip, length, after):
    vcpu = make_vcpu(mode, kvm={"interruptibility": 1})
    kvm_rip_write(vcpu, rip)
    vcpu.vmcs.hw_write(vf.VM_EXIT_INSTRUCTION_LEN, length)
    assert skip_emulated_instruction(vcpu) == 1
    assert kvm_rip_read(vcpu) == after
    assert vmx_get_interrupt_shadow(vcpu) == 0


@pytest.mark.parametrize(
    ("hypervisor", "reason", "skips"), [(1, 49, 1), (1, 1 << 31 | 49, 1), (1, 10, 0), (0, 49, 0)]
)
def test_a_hypervisor_below_may_not_report_the_length(hypervisor, reason, skips):
    hooks = Hooks()
    vcpu = make_vcpu(knobs={"host_hypervisor": hypervisor}, hooks=hooks, kvm={"interruptibility": 2})
    vcpu.exit_reason = reason
    assert skip_emulated_instruction(vcpu) == 1
    assert hooks.skips == skips
    assert vmx_get_interrupt_shadow(vcpu) == 0


def test_a_failed_skip_leaves_everything():
    class Failing(Hooks):
        def emulate_skip(self):
            return 0

    vcpu = make_vcpu(knobs={"host_hypervisor": 1}, hooks=Failing(), kvm={"interruptibility": 2}, rflags=TF)
    vcpu.exit_reason = 49
    assert kvm_skip_emulated_instruction(vcpu) == 0
    assert vmx_get_interrupt_shadow(vcpu) == MOV_SS
    assert not vcpu.exception.pending


@pytest.mark.parametrize(
    ("rflags", "guest_debug", "result", "pending"),
    [(2, None, 1, False), (2 | TF, None, 1, True), (2, 3, 0, False)],
)
def test_single_step_after_a_skip(rflags, guest_debug, result, pending):
    vcpu = make_vcpu(rflags=rflags, kvm={"guest_debug": guest_debug} if guest_debug else {})
    assert kvm_skip_emulated_instruction(vcpu) == result
    assert vcpu.exception.pending is pending
    assert (vcpu.run.exit_reason == "DEBUG") is (result == 0)


@pytest.mark.parametrize(
    ("queue", "pending"),
    [
        (None, True),
        (lambda v: kvm_queue_exception_p(v, 1, 1), True),
        (lambda v: kvm_queue_exception(v, 6), False),
    ],
)
def test_monitor_trap_of_l1(queue, pending):
    vcpu = make_vcpu(kvm={"guest_mode": {"mtf": True}})
    if queue:
        queue(vcpu)
    vmx_update_emulated_instruction(vcpu)
    assert vcpu.mtf_pending is pending


def test_no_monitor_trap_outside_guest_mode_or_unasked():
    for kvm in ({}, {"guest_mode": True}):
        vcpu = make_vcpu(kvm=kvm)
        vmx_update_emulated_instruction(vcpu)
        assert not vcpu.mtf_pending
