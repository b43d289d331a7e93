"""Events on their way into the guest: VM-entry fields, the real-mode IVT, NMIs, re-injection."""

from __future__ import annotations

import pytest
from support.vcpus import Hooks, make_vcpu

from emufuzz.kvm import exceptions as e
from emufuzz.kvm import inject as i
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.rflags_read import vmx_get_rflags

DB, BP, UD, GP, PF = 1, 3, 6, 13, 14
RF, TF, IF = 1 << 16, 1 << 8, 1 << 9
VALID = 1 << 31
STI, MOV_SS, NMI = 1, 2, 8
RESTRICTED = {"unrestricted_guest": 0}


def entry_info(vcpu):
    return vcpu.vmcs.read(vf.VM_ENTRY_INTR_INFO_FIELD)


@pytest.mark.parametrize(
    ("vector", "error_code", "info"),
    [
        (UD, None, VALID | 3 << 8 | UD),
        (GP, 0x12340018, VALID | 3 << 8 | 1 << 11 | GP),
        (BP, None, VALID | 6 << 8 | BP),
    ],
)
def test_exceptions(vector, error_code, info):
    vcpu = make_vcpu()
    vcpu.event_exit_inst_len = 1
    e.kvm_multiple_exception(vcpu, vector, error_code=error_code)
    i.kvm_check_and_inject_events(vcpu)
    assert entry_info(vcpu) == info
    assert (vcpu.exception.pending, vcpu.exception.injected) == (False, True)
    assert vcpu.vmcs.read(vf.VM_ENTRY_EXCEPTION_ERROR_CODE) == (error_code or 0) & 0xFFFF
    assert vcpu.vmcs.read(vf.VM_ENTRY_INSTRUCTION_LEN) == (1 if vector == BP else 0)
    assert bool(vmx_get_rflags(vcpu) & RF) is (vector != BP)


def test_a_page_fault_stores_cr2_at_delivery():
    vcpu = make_vcpu()
    e.kvm_multiple_exception(vcpu, PF, error_code=2, payload=0x1234000)
    assert vcpu.cr2 == 0
    i.kvm_check_and_inject_events(vcpu)
    assert vcpu.cr2 == 0x1234000


def test_debug_exceptions_clear_general_detect_and_leave_rf():
    vcpu = make_vcpu(dr=(0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x2400))
    e.kvm_queue_exception_p(vcpu, DB, 1 << 13)
    i.kvm_check_and_inject_events(vcpu)
    assert vcpu.dr7 == 0x400 == vcpu.vmcs.read(vf.GUEST_DR7)
    assert vcpu.dr6 == 0xFFFF2FF0
    assert not vmx_get_rflags(vcpu) & RF


@pytest.mark.parametrize(
    ("rflags", "shadow", "pending"), [(TF, MOV_SS, 1 << 14), (TF, STI, 1 << 14), (TF, 0, 0), (0, STI, 0)]
)
def test_single_step_under_a_shadow_needs_a_pending_bs(rflags, shadow, pending):
    vcpu = make_vcpu(rflags=rflags, kvm={"interruptibility": shadow})
    e.kvm_queue_exception(vcpu, DB)
    i.kvm_check_and_inject_events(vcpu)
    assert vcpu.vmcs.read(vf.GUEST_PENDING_DBG_EXCEPTIONS) == pending


@pytest.mark.parametrize(("mode", "code"), [("prot32", True), ("real", False)])
def test_real_mode_has_no_error_codes(mode, code):
    vcpu = make_vcpu(mode)
    e.kvm_inject_gp(vcpu, 0x10)
    i.kvm_check_and_inject_events(vcpu)
    assert bool(entry_info(vcpu) & 1 << 11) is code


@pytest.mark.parametrize(
    ("queue", "expected"),
    [
        (e.kvm_inject_gp, (GP, 0)),
        (lambda v: e.kvm_queue_exception(v, BP), (BP, 2)),
        (lambda v: e.kvm_queue_interrupt(v, 0x21, soft=False), (0x21, 0)),
        (lambda v: e.kvm_queue_interrupt(v, 0x21, soft=True), (0x21, 2)),
        (lambda v: setattr(v, "nmi_pending", 1), (2, 0)),
    ],
)
@pytest.mark.parametrize("delivers", [True, False])
def test_the_vm86_stand_in_delivers_through_the_ivt(queue, expected, delivers):
    hooks = Hooks(delivers=delivers)
    vcpu = make_vcpu("real", knobs=RESTRICTED, hooks=hooks)
    vcpu.event_exit_inst_len = 2
    queue(vcpu)
    i.kvm_check_and_inject_events(vcpu)
    assert hooks.delivered == [expected]
    assert ("TRIPLE_FAULT" in vcpu.requests) is not delivers
    assert entry_info(vcpu) == 0


@pytest.mark.parametrize(
    ("soft", "info", "length"), [(False, VALID | 0x21, 0), (True, VALID | 4 << 8 | 0x21, 2)]
)
def test_interrupts(soft, info, length):
    vcpu = make_vcpu()
    vcpu.event_exit_inst_len = 2
    e.kvm_queue_interrupt(vcpu, 0x21, soft=soft)
    i.kvm_check_and_inject_events(vcpu)
    assert (entry_info(vcpu), vcpu.vmcs.read(vf.VM_ENTRY_INSTRUCTION_LEN)) == (info, length)


def test_a_pending_exception_goes_before_an_interrupted_interrupt():
    vcpu = make_vcpu()
    e.kvm_queue_interrupt(vcpu, 0x21, soft=False)
    e.kvm_queue_exception(vcpu, UD)
    i.kvm_check_and_inject_events(vcpu)
    assert entry_info(vcpu) == VALID | 3 << 8 | UD
    assert vcpu.interrupt.injected


def test_an_injected_exception_is_injected_again():
    vcpu = make_vcpu()
    e.kvm_requeue_exception_e(vcpu, GP, 8)
    i.kvm_check_and_inject_events(vcpu)
    assert entry_info(vcpu) == VALID | 3 << 8 | 1 << 11 | GP
    assert not vmx_get_rflags(vcpu) & RF


@pytest.mark.parametrize("state", [0, STI, MOV_SS, NMI])
def test_nmis_wait_for_their_window(state):
    vcpu = make_vcpu(kvm={"interruptibility": state})
    e.kvm_inject_nmi(vcpu)
    i.process_nmi(vcpu)
    i.kvm_check_and_inject_events(vcpu)
    primary = vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL)
    if state:
        assert entry_info(vcpu) == 0
        assert primary & (1 << 2 if state == STI else 1 << 22)
    else:
        assert entry_info(vcpu) == VALID | 2 << 8 | 2
        assert vcpu.nmi_injected
        assert not vcpu.nmi_pending


@pytest.mark.parametrize(("state", "limit"), [(0, 2), (NMI, 1)])
def test_at_most_two_nmis_are_remembered(state, limit):
    vcpu = make_vcpu(kvm={"interruptibility": state})
    for _ in range(5):
        e.kvm_inject_nmi(vcpu)
    i.process_nmi(vcpu)
    assert (vcpu.nmi_pending, vcpu.nmi_queued) == (limit, 0)


def test_without_virtual_nmis_kvm_remembers_the_blocking():
    vcpu = make_vcpu(knobs={"vnmi": 0})
    vcpu.nmi_pending = 2
    i.kvm_check_and_inject_events(vcpu)
    assert i.vmx_get_nmi_mask(vcpu)
    assert i.vmx_nmi_blocked(vcpu)
    assert vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & 1 << 2
    i.vmx_set_nmi_mask(vcpu, masked=False)
    assert not i.vmx_get_nmi_mask(vcpu)


def test_nmi_mask_is_cached_until_an_injection():
    vcpu = make_vcpu()
    i.vmx_set_nmi_mask(vcpu, masked=True)
    assert i.vmx_get_nmi_mask(vcpu)
    i.vmx_set_nmi_mask(vcpu, masked=False)
    vcpu.vmcs.set_bits(vf.GUEST_INTERRUPTIBILITY_INFO, NMI)
    assert not i.vmx_get_nmi_mask(vcpu)
    i.vmx_inject_nmi(vcpu)
    assert i.vmx_get_nmi_mask(vcpu)


def test_l1_takes_events_of_l2_as_exits_whatever_l2_blocks():
    kvm = {"interruptibility": NMI | STI, "guest_mode": {"exit_on_nmi": True, "exit_on_intr": True}}
    vcpu = make_vcpu(kvm=kvm)
    assert not i.vmx_nmi_blocked(vcpu)
    assert not i.vmx_interrupt_blocked(vcpu)


@pytest.mark.parametrize(
    ("rflags", "state", "blocked"),
    [(IF, 0, False), (0, 0, True), (IF, STI, True), (IF, MOV_SS, True), (IF, NMI, False)],
)
def test_interrupt_window(rflags, state, blocked):
    assert i.vmx_interrupt_blocked(make_vcpu(rflags=rflags, kvm={"interruptibility": state})) is blocked


def test_a_blocking_debugger_keeps_nmis_out():
    vcpu = make_vcpu(kvm={"guest_debug": 1 | 1 << 20})
    vcpu.nmi_pending = 1
    i.kvm_check_and_inject_events(vcpu)
    assert (entry_info(vcpu), vcpu.nmi_pending) == (0, 1)


@pytest.mark.parametrize(
    ("info", "check"),
    [
        (0, lambda v: not e.kvm_event_needs_reinjection(v)),
        (VALID | 2 << 8 | 2, lambda v: v.nmi_injected),
        (VALID | 3 << 8 | UD, lambda v: v.exception.injected and not v.exception.has_error_code),
        (VALID | 3 << 8 | 1 << 11 | GP, lambda v: v.exception.error_code == 0x18),
        (VALID | 6 << 8 | BP, lambda v: v.exception.vector == BP and v.event_exit_inst_len == 1),
        (VALID | 4 << 8 | 0x80, lambda v: v.interrupt.soft and v.event_exit_inst_len == 1),
        (VALID | 0x30, lambda v: v.interrupt.nr == 0x30 and not v.interrupt.soft),
        (VALID | 7 << 8, lambda v: not e.kvm_event_needs_reinjection(v)),
    ],
)
def test_interrupted_deliveries_are_queued_again(info, check):
    vcpu = make_vcpu()
    e.kvm_queue_exception(vcpu, UD)
    vcpu.requests.clear()
    vcpu.vmcs.hw_write(vf.IDT_VECTORING_INFO_FIELD, info)
    vcpu.vmcs.hw_write(vf.IDT_VECTORING_ERROR_CODE, 0x18)
    vcpu.vmcs.hw_write(vf.VM_EXIT_INSTRUCTION_LEN, 1)
    i.vmx_complete_interrupts(vcpu)
    assert check(vcpu)
    assert ("EVENT" in vcpu.requests) is bool(info)


def test_a_cancelled_entry_gives_its_event_back():
    vcpu = make_vcpu()
    e.kvm_inject_gp(vcpu, 0x18)
    i.kvm_check_and_inject_events(vcpu)
    i.vmx_cancel_injection(vcpu)
    assert entry_info(vcpu) == 0
    assert (vcpu.exception.vector, vcpu.exception.error_code, vcpu.exception.injected) == (GP, 0x18, True)


def test_an_event_wakes_a_guest_that_halts_without_exit():
    for knobs, state in (({"hlt_in_guest": 1}, 0), ({}, 1)):
        vcpu = make_vcpu(knobs=knobs)
        vcpu.vmcs.write(vf.GUEST_ACTIVITY_STATE, 1)
        i.vmx_inject_nmi(vcpu)
        assert vcpu.vmcs.read(vf.GUEST_ACTIVITY_STATE) == state


@pytest.mark.parametrize("queue", [e.kvm_inject_gp, lambda v: e.kvm_queue_interrupt(v, 0x21, soft=False)])
def test_an_nmi_behind_another_event_makes_the_entry_exit_at_once(queue):
    vcpu = make_vcpu()
    vcpu.nmi_pending = 1
    queue(vcpu)
    assert i.kvm_check_and_inject_events(vcpu)
    assert vcpu.nmi_pending == 1
    assert not vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & 1 << 22


def test_an_nmi_that_l1_takes_is_not_injected_into_l2():
    vcpu = make_vcpu(kvm={"guest_mode": {"exit_on_nmi": True}})
    vcpu.nmi_pending = 1
    assert i.kvm_check_and_inject_events(vcpu)
    assert entry_info(vcpu) == 0


def test_an_nmi_whose_delivery_was_interrupted_is_injected_again():
    vcpu = make_vcpu()
    vcpu.nmi_injected = True
    assert not i.kvm_check_and_inject_events(vcpu)
    assert entry_info(vcpu) == VALID | 2 << 8 | 2
