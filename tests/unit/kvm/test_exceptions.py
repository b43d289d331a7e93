"""The exception queue: SDM Vol. 3A Table 6-5, payloads, page faults."""

from __future__ import annotations

import pytest
from support.vcpus import Hooks, make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm import exceptions as e

DE, DB, BP, UD, NM, DF, TS, NP, SS, GP, PF, MC = 0, 1, 3, 6, 7, 8, 10, 11, 12, 13, 14, 18
CONTRIBUTORY = (DE, TS, NP, SS, GP)
L2 = {"guest_mode": {"exception_bitmap": 1 << GP}}


def queue(vcpu, vector):
    if e.x86_exception_has_error_code(vector):
        e.kvm_queue_exception_e(vcpu, vector, 0x10)
    else:
        e.kvm_queue_exception(vcpu, vector)


def expected_merge(first, second):
    if first == DF:
        return "triple"
    contributory = first in CONTRIBUTORY and second in CONTRIBUTORY
    return DF if contributory or (first == PF and second in (*CONTRIBUTORY, PF)) else second


@pytest.mark.parametrize("first", [DE, DB, UD, DF, TS, NP, SS, GP, PF, MC])
@pytest.mark.parametrize("second", [DE, DB, UD, NP, GP, PF, MC])
@pytest.mark.parametrize("injected", [False, True])
def test_merging(first, second, injected):
    vcpu = make_vcpu()
    queue(vcpu, first)
    if injected:
        vcpu.exception.pending, vcpu.exception.injected = False, True
    queue(vcpu, second)
    expected = expected_merge(first, second)
    assert e.kvm_is_exception_pending(vcpu)
    if expected == "triple":
        assert "TRIPLE_FAULT" in vcpu.requests
        assert vcpu.exception.vector == DF
        return
    assert "TRIPLE_FAULT" not in vcpu.requests
    queued = vcpu.exception
    assert (queued.vector, queued.pending, queued.injected) == (expected, True, False)
    if expected == DF:
        assert (queued.has_error_code, queued.error_code) == (True, 0)


def test_queueing_asks_for_injection_and_clearing_forgets():
    vcpu = make_vcpu()
    assert not e.kvm_is_exception_pending(vcpu)
    e.kvm_inject_gp(vcpu, 0x28)
    assert "EVENT" in vcpu.requests
    assert (vcpu.exception.vector, vcpu.exception.error_code) == (GP, 0x28)
    e.kvm_clear_exception_queue(vcpu)
    assert not e.kvm_is_exception_pending(vcpu)
    e.kvm_queue_exception(vcpu, UD)
    assert (vcpu.exception.vector, vcpu.exception.has_error_code) == (UD, False)


def test_requeued_exceptions_are_being_delivered():
    vcpu = make_vcpu()
    e.kvm_requeue_exception(vcpu, NM)
    assert (vcpu.exception.injected, vcpu.exception.pending) == (True, False)
    assert e.kvm_event_needs_reinjection(vcpu)
    e.kvm_clear_exception_queue(vcpu)
    e.kvm_requeue_exception_e(vcpu, GP, 0x18)
    assert (vcpu.exception.has_error_code, vcpu.exception.error_code) == (True, 0x18)


def test_interrupt_queue():
    vcpu = make_vcpu()
    e.kvm_queue_interrupt(vcpu, 0x80, soft=True)
    assert (vcpu.interrupt.nr, vcpu.interrupt.soft) == (0x80, True)
    assert e.kvm_event_needs_reinjection(vcpu)
    e.kvm_clear_interrupt_queue(vcpu)
    assert not e.kvm_event_needs_reinjection(vcpu)
    e.kvm_inject_nmi(vcpu)
    assert vcpu.nmi_queued == 1
    assert "NMI" in vcpu.requests


@pytest.mark.parametrize(
    ("before", "payload", "after"),
    [
        (0xFFFF0FF0, 1 << 14, 0xFFFF4FF0),  # single step
        (0xFFFF0FF5, 0x2, 0xFFFF0FF2),  # trap bits are replaced
        (0xFFFF4FF0, 0x1, 0xFFFF4FF1),  # BS only adds up
        (0xFFFF0FF0, 1 << 16, 0xFFFE0FF0),  # RTM is active low
        (0xFFFE0FF0, 0x1, 0xFFFF0FF1),
        (0xFFFF0FF0, 1 << 12 | 1 << 3, 0xFFFF0FF8),  # "enabled breakpoint" does not exist in DR6
        (0, 1 << 13, 0xFFFF27F0),
    ],
)
def test_debug_payload(before, payload, after):
    vcpu = make_vcpu()
    vcpu.dr6 = before
    e.kvm_queue_exception_p(vcpu, DB, payload)
    assert vcpu.dr6 == before
    e.kvm_deliver_exception_payload(vcpu, vcpu.exception)
    assert vcpu.dr6 == after
    assert not vcpu.exception.has_payload


@pytest.mark.parametrize(("enabled", "cr2"), [(False, 0x1234), (True, 0)])
def test_userspace_that_does_not_know_payloads_sees_them_early(enabled, cr2):
    vcpu = make_vcpu(knobs={"exception_payload_enabled": enabled})
    fault = X86Exception()
    fault.address, fault.error_code = 0x1234, 2
    e.kvm_inject_page_fault(vcpu, fault)
    e.kvm_handle_exception_payload_quirk(vcpu)
    assert vcpu.cr2 == cr2


@pytest.mark.parametrize(("error_code", "invalidates"), [(0x7, True), (0x2, False), (0x9, False)])
def test_page_faults_of_the_walker(error_code, invalidates):
    hooks = Hooks()
    vcpu = make_vcpu(hooks=hooks)
    fault = X86Exception()
    fault.address, fault.error_code = 0xDEAD000, error_code
    e.kvm_inject_emulated_page_fault(vcpu, fault)
    queued = vcpu.exception
    assert (queued.vector, queued.error_code, queued.payload) == (PF, error_code, 0xDEAD000)
    assert bool(hooks.calls["mmu_invalidate_addr"]) is invalidates


@pytest.mark.parametrize(("vector", "error_code", "to_l1"), [(GP, 0, True), (UD, 0, False), (PF, 2, False)])
def test_l1_gets_what_it_intercepts(vector, error_code, to_l1):
    vcpu = make_vcpu(kvm=L2)
    e.kvm_queue_exception_e(vcpu, vector, error_code)
    assert (vcpu.exception_vmexit.pending, vcpu.exception.pending) == (to_l1, not to_l1)
    e.kvm_clear_exception_queue(vcpu)
    e.kvm_requeue_exception_e(vcpu, vector, error_code)
    assert vcpu.exception.injected
    assert not vcpu.exception_vmexit.pending


@pytest.mark.parametrize(
    ("bitmap", "mask", "match", "error_code", "to_l1"),
    [
        (1 << PF, 0, 0, 5, True),
        (0, 0, 0, 5, False),
        (1 << PF, 1, 1, 4, False),
        (0, 1, 1, 4, True),
        (0, 0, 1, 4, True),
    ],
)
def test_l1_intercepts_page_faults_by_error_code(bitmap, mask, match, error_code, to_l1):
    mode = {
        "exception_bitmap": bitmap,
        "page_fault_error_code_mask": mask,
        "page_fault_error_code_match": match,
    }
    vcpu = make_vcpu(kvm={"guest_mode": mode})
    e.kvm_queue_exception_e(vcpu, PF, error_code)
    assert vcpu.exception_vmexit.pending is to_l1


@pytest.mark.parametrize(
    ("vector", "kind"),
    [(GP, e.EXCPT_FAULT), (BP, e.EXCPT_TRAP), (4, e.EXCPT_TRAP), (DF, e.EXCPT_ABORT), (DB, e.EXCPT_DB),
     (2, e.EXCPT_INTERRUPT), (32, e.EXCPT_INTERRUPT), (9, e.EXCPT_FAULT)],
)  # fmt: skip
def test_types(vector, kind):
    assert e.exception_type(vector) == kind
    assert e.kvm_exception_is_soft(vector) is (vector in (3, 4))


@pytest.mark.parametrize(("cpl", "required", "passes"), [(0, 0, True), (3, 0, False), (3, 3, True)])
def test_privilege_check(cpl, required, passes):
    vcpu = make_vcpu(cpl=cpl)
    assert e.kvm_require_cpl(vcpu, required) is passes
    assert vcpu.exception.pending is not passes
    assert passes or (vcpu.exception.vector, vcpu.exception.error_code) == (GP, 0)


@pytest.mark.parametrize(("dr", "de", "passes"), [(4, 1, False), (5, 1, False), (5, 0, True), (6, 1, True)])
def test_debug_register_aliases(dr, de, passes):
    vcpu = make_vcpu("prot32", cr4=crs.X86_CR4_DE * de)
    assert e.kvm_require_dr(vcpu, dr) is passes
    assert passes or vcpu.exception.vector == UD
