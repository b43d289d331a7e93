"""SDM Vol. 3C 26.3.1.2: which segments VM entry takes, and when KVM has to emulate instead."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.case.model import Segment
from emufuzz.kvm.cr import kvm_set_cr0
from emufuzz.kvm.guest_state import guest_state_valid, vmx_emulation_required, vmx_set_segment
from emufuzz.kvm.rflags import vmx_set_rflags
from emufuzz.kvm.segments import vmx_get_segment

ES, CS, SS, DS, FS, GS, TR, LDTR = range(8)
RESTRICTED = {"unrestricted_guest": 0}


def changed(vcpu, seg, **changes):
    var = vmx_get_segment(vcpu, seg)
    for name, value in changes.items():
        setattr(var, name, value)
    vmx_set_segment(vcpu, var, seg)
    return vcpu


@pytest.mark.parametrize("mode", ["real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64"])
def test_valid_states_of_every_mode(mode):
    vcpu = make_vcpu(mode, knobs=RESTRICTED)
    if mode == "vm86":
        for seg in (ES, CS, SS, DS, FS, GS):
            changed(vcpu, seg, limit=0xFFFF, type=3, s=1, dpl=3, present=1, unusable=0)
    assert guest_state_valid(vcpu)
    assert not vcpu.emulation_required


@pytest.mark.parametrize(
    ("seg", "changes", "valid"),
    [
        (CS, {"selector": 0x0B}, False),  # RPL differs from that of SS
        (CS, {"unusable": 1}, False),
        (CS, {"type": 10}, False),  # not accessed
        (CS, {"type": 3}, False),  # data
        (CS, {"s": 0}, False),
        (CS, {"dpl": 1}, False),
        (CS, {"type": 15}, True),  # conforming, DPL = RPL
        (CS, {"type": 15, "dpl": 1}, False),
        (SS, {"unusable": 1}, True),
        (SS, {"type": 7}, True),
        (SS, {"type": 1}, False),
        (SS, {"type": 11}, False),
        (SS, {"s": 0}, False),
        (SS, {"dpl": 3}, False),
        (DS, {"unusable": 1}, True),
        (DS, {"s": 0}, False),
        (DS, {"selector": 3, "dpl": 0}, False),
        (DS, {"selector": 3, "dpl": 0, "type": 15}, True),  # conforming code
        (DS, {"selector": 3, "dpl": 0, "type": 11}, False),
        (GS, {"selector": 3, "dpl": 3}, True),
        (FS, {"selector": 2, "dpl": 1}, False),
        (ES, {"s": 0}, False),
        (TR, {"unusable": 1}, False),
        (TR, {"selector": 0x2C}, False),  # in the LDT
        (TR, {"type": 9}, False),  # not busy
        (TR, {"type": 3}, True),
        (LDTR, {"unusable": 1}, True),
        (LDTR, {"selector": 4, "unusable": 0, "present": 1, "type": 2}, False),
        (LDTR, {"selector": 0x38, "unusable": 0, "present": 1, "type": 2}, True),
        (LDTR, {"selector": 0x38, "unusable": 0, "present": 1, "type": 3}, False),
    ],
)
def test_protected_mode(seg, changes, valid):
    vcpu = changed(make_vcpu("prot32", 0, knobs=RESTRICTED), seg, **changes)
    assert guest_state_valid(vcpu) is valid
    assert vcpu.emulation_required is not valid


@pytest.mark.parametrize("seg", [ES, CS, SS, DS, FS, GS])
@pytest.mark.parametrize(
    ("changes", "valid"),
    [
        ({}, True),
        ({"base": 0x123450}, False),
        ({"selector": 0x100, "base": 0x1000}, True),
        ({"limit": 0xFFFFFFFF}, False),
        ({"limit": 0xFFFE}, False),
        ({"dpl": 0}, True),
        ({"g": 1}, False),
        ({"db": 1}, False),
        ({"s": 0}, False),
    ],
)
def test_real_mode(seg, changes, valid):
    vcpu = changed(make_vcpu("real", knobs=RESTRICTED), seg, **changes)
    if changes.get("s") == 0:
        assert vcpu.rmode.segs[seg].s == 0
    assert guest_state_valid(vcpu) is valid


def test_the_type_counts_outside_cs_only():
    assert not guest_state_valid(changed(make_vcpu("real", knobs=RESTRICTED), DS, type=11))
    assert guest_state_valid(changed(make_vcpu("real", knobs=RESTRICTED), CS, type=11))


def test_unrestricted_guests_and_the_knob():
    for knobs, required in (
        ({}, False),
        (RESTRICTED, True),
        ({**RESTRICTED, "emulate_invalid_guest_state": 0}, False),
    ):
        vcpu = changed(make_vcpu("prot32", knobs=knobs), CS, selector=0x0B)
        assert not guest_state_valid(vcpu)
        assert vmx_emulation_required(vcpu) is required


def test_an_l2_may_be_restricted_by_its_l1():
    for intercepts, required in (([], True), (["unrestricted_guest"], False)):
        vcpu = make_vcpu("prot32", kvm={"guest_mode": {"intercepts": intercepts}})
        assert changed(vcpu, CS, selector=0x0B).emulation_required is required


def test_it_is_decided_anew_when_pe_or_vm_changes():
    cs = Segment(sel=0x101, base=0x1010, limit=0xFFFF, type=11, s=1, p=1)
    vcpu = make_vcpu("real", knobs=RESTRICTED, cs=cs)
    assert not vcpu.emulation_required
    kvm_set_cr0(vcpu, vcpu.cr0 | crs.X86_CR0_PE)
    assert vcpu.emulation_required  # the selector's low bits are an RPL now, unlike that of SS
    kvm_set_cr0(vcpu, vcpu.cr0 & ~crs.X86_CR0_PE)
    assert not vcpu.emulation_required
    vcpu = make_vcpu("prot32", knobs=RESTRICTED)
    vmx_set_rflags(vcpu, 2 | 1 << 17)
    assert vcpu.emulation_required
    vmx_set_rflags(vcpu, 2)
    assert not vcpu.emulation_required
