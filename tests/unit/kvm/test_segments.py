"""Segment registers through the VMCS, CPL, table registers; real mode on virtual-8086 mode."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.case.model import Segment
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.cr import kvm_set_cr0
from emufuzz.kvm.guest_state import vmx_set_segment
from emufuzz.kvm.regs import vmx_after_exit, vmx_before_entry
from emufuzz.kvm.rflags import kvm_get_linear_rip, kvm_is_linear_rip, vmx_set_rflags
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.rmode import RMODE_TSS_SIZE, vmx_need_pf_intercept
from emufuzz.kvm.segments import (
    KVM_VMX_SEGMENT_FIELDS,
    get_segment_base,
    is_64_bit_mode,
    vmx_get_cpl,
    vmx_get_cs_db_l_bits,
    vmx_get_gdt,
    vmx_get_idt,
    vmx_get_segment,
    vmx_segment_access_rights,
    vmx_set_gdt,
    vmx_set_idt,
)
from emufuzz.kvm.vcpu import KvmSegment

ES, CS, SS, DS, FS, GS, TR, LDTR = range(8)
RESTRICTED = {"unrestricted_guest": 0}
VM_IOPL3 = 1 << 17 | 3 << 12


def segment(**changes):
    fields = {"selector": 0x33, "base": 0x1000, "limit": 0xFFFFF, "type": 3, "s": 1, "dpl": 3, "present": 1}
    return KvmSegment(**{**fields, **changes})


def ar(vcpu, seg):
    return vcpu.vmcs.read(KVM_VMX_SEGMENT_FIELDS[seg][3])


@pytest.mark.parametrize(
    ("var", "expected"),
    [
        (segment(), 0xF3),
        (segment(type=11, dpl=0, l=1, g=1), 0xA09B),
        (segment(db=1, g=1, avl=1), 0xD0F3),
        (segment(present=0), 0x10073),
        (segment(unusable=1), 0x100F3),
        (KvmSegment(), 0x10000),
    ],
)
def test_access_rights(var, expected):
    assert vmx_segment_access_rights(var) == expected


@pytest.mark.parametrize("seg", range(8))
def test_a_segment_survives_the_vmcs(seg):
    vcpu = make_vcpu("prot32")
    var = segment(g=1, db=1, avl=1, base=0xFFFF_8000_0000_1000)
    vmx_set_segment(vcpu, var.copy(), seg)
    vmx_before_entry(vcpu)
    vmx_after_exit(vcpu)
    assert vmx_get_segment(vcpu, seg).key() == var.key()
    assert get_segment_base(vcpu, seg) == var.base


def test_the_accessed_bit_is_added_for_unrestricted_guests_but_not_in_ldtr():
    vcpu = make_vcpu("prot32")
    for seg in (DS, LDTR):
        vmx_set_segment(vcpu, segment(type=2), seg)
    assert (vmx_get_segment(vcpu, DS).type, vmx_get_segment(vcpu, LDTR).type) == (3, 2)
    restricted = make_vcpu("prot32", knobs=RESTRICTED)
    vmx_set_segment(restricted, segment(type=2), DS)
    assert vmx_get_segment(restricted, DS).type == 2


def test_fields_are_read_once_each_until_a_store():
    vcpu = make_vcpu("prot32")
    vmx_after_exit(vcpu)
    base = get_segment_base(vcpu, FS)
    vcpu.vmcs.write(vf.GUEST_FS_BASE, base + 0x1000)
    vcpu.vmcs.write(vf.GUEST_GS_BASE, 0x777)
    assert get_segment_base(vcpu, FS) == base
    assert get_segment_base(vcpu, GS) == 0x777
    vmx_set_segment(vcpu, vmx_get_segment(vcpu, DS), DS)
    assert get_segment_base(vcpu, FS) == base + 0x1000


@pytest.mark.parametrize(
    ("mode", "cpl", "db", "l"),
    [("prot64", 3, 0, 1), ("prot64", 0, 0, 1), ("compat32", 3, 1, 0), ("prot16", 0, 0, 0), ("real", 0, 0, 0)],
)
def test_cpl_and_code_size(mode, cpl, db, l):  # noqa: E741 - the architectural name
    vcpu = make_vcpu(mode, cpl)
    assert vmx_get_cpl(vcpu) == cpl
    assert vmx_get_cs_db_l_bits(vcpu) == (db, l)
    assert is_64_bit_mode(vcpu) is (mode == "prot64")


def test_table_registers():
    vcpu = make_vcpu()
    vmx_set_gdt(vcpu, 0xFFFF_8000_0000_0000, 0x1_0127)
    vmx_set_idt(vcpu, 0x5000, 0x7FF)
    assert vmx_get_gdt(vcpu) == (0xFFFF_8000_0000_0000, 0x127)
    assert vmx_get_idt(vcpu) == (0x5000, 0x7FF)


@pytest.mark.parametrize(
    ("mode", "base", "expected"), [("prot64", 0x5000, 0x6000), ("prot32", 0xFFFFF000, 0x5000)]
)
def test_linear_rip(mode, base, expected):
    vcpu = make_vcpu(mode)
    var = vmx_get_segment(vcpu, CS)
    var.base = base
    vmx_set_segment(vcpu, var, CS)
    vcpu.regs[16] = 0x6000
    assert kvm_get_linear_rip(vcpu) == expected
    assert kvm_is_linear_rip(vcpu, expected)


# -- real mode without unrestricted guest ------------------------------------------------------


def test_hardware_runs_virtual_8086_mode_in_place_of_real_mode():
    vcpu = make_vcpu("real", knobs=RESTRICTED, rflags=0x202)
    assert vcpu.rmode.vm86_active
    assert vcpu.vmcs.read(vf.GUEST_RFLAGS) == 0x202 | VM_IOPL3
    assert vmx_get_rflags(vcpu) == 0x202
    assert vcpu.vmcs.read(vf.GUEST_CR4) & crs.X86_CR4_VME
    assert vcpu.vmcs.read(vf.EXCEPTION_BITMAP) == 0xFFFFFFFF & ~(1 << 14)
    assert vcpu.vmcs.read(vf.GUEST_TR_LIMIT) == RMODE_TSS_SIZE - 1 == 0x2088
    assert (ar(vcpu, TR), ar(vcpu, DS), ar(vcpu, CS)) == (0x8B, 0xF3, 0xF3)
    assert vmx_get_cpl(vcpu) == 0
    assert vmx_get_segment(vcpu, CS).type == 11


def test_guest_flags_are_merged_after_an_exit():
    vcpu = make_vcpu("real", knobs=RESTRICTED)
    vmx_set_rflags(vcpu, 0x1002)  # IOPL 1 is the guest's own
    vmx_before_entry(vcpu)
    vmx_after_exit(vcpu)
    assert vcpu.vmcs.read(vf.GUEST_RFLAGS) == 0x2 | VM_IOPL3
    vcpu.vmcs.write(vf.GUEST_RFLAGS, 0x247 | VM_IOPL3)
    assert vmx_get_rflags(vcpu) == 0x1247


def test_a_selector_that_the_guest_loaded_wins_over_the_saved_segment():
    vcpu = make_vcpu("real", knobs=RESTRICTED)
    vmx_after_exit(vcpu)
    vcpu.vmcs.write(vf.GUEST_DS_SELECTOR, 0x1234)
    vcpu.vmcs.write(vf.GUEST_DS_BASE, 0x12340)
    var = vmx_get_segment(vcpu, DS)
    assert (var.selector, var.base, var.dpl) == (0x1234, 0x12340, 0)
    assert get_segment_base(vcpu, DS) == 0x12340


def test_stores_in_the_stand_in_keep_the_guests_segment():
    vcpu = make_vcpu("real", knobs=RESTRICTED)
    vmx_set_segment(vcpu, segment(selector=0x100, base=0x1000, limit=0xFFFF, dpl=0), DS)
    vmx_set_segment(vcpu, segment(selector=0x28, base=0x9000, type=11, s=0), TR)
    assert (vmx_get_segment(vcpu, DS).dpl, ar(vcpu, DS)) == (0, 0xF3)
    assert vmx_get_segment(vcpu, TR).base == 0x9000
    assert vcpu.vmcs.read(vf.GUEST_TR_SELECTOR) == 0x28
    assert vcpu.vmcs.read(vf.GUEST_TR_BASE) == vcpu.options.tss_addr


@pytest.mark.parametrize(("emulate", "limit"), [(1, 0xFFFFFFFF), (0, 0xFFFF)])
def test_without_invalid_state_emulation_segments_are_forced_to_suit(emulate, limit):
    vcpu = make_vcpu("real", knobs={**RESTRICTED, "emulate_invalid_guest_state": emulate})
    vmx_set_segment(vcpu, segment(selector=1, base=0x12345, limit=0xFFFFFFFF, g=1), DS)
    selector, base, seg_limit, _ = (vcpu.vmcs.read(field) for field in KVM_VMX_SEGMENT_FIELDS[DS])
    assert seg_limit == limit
    assert (selector, base) == ((1, 0x12345) if emulate else (0x1234, 0x12340))
    assert vmx_get_segment(vcpu, DS).limit == 0xFFFFFFFF or not emulate


def test_to_protected_mode_and_back():
    vcpu = make_vcpu("real", knobs=RESTRICTED)
    vmx_set_rflags(vcpu, 0x3002)
    before = [vmx_get_segment(vcpu, seg).key() for seg in range(8)]
    assert not kvm_set_cr0(vcpu, vcpu.cr0 | crs.X86_CR0_PE)
    assert not vcpu.rmode.vm86_active
    assert vcpu.vmcs.read(vf.GUEST_RFLAGS) == 0x3002
    assert not vcpu.vmcs.read(vf.GUEST_CR4) & crs.X86_CR4_VME
    assert [vmx_get_segment(vcpu, seg).key() for seg in range(8)] == before
    assert not kvm_set_cr0(vcpu, vcpu.cr0 & ~crs.X86_CR0_PE)
    assert vcpu.rmode.vm86_active
    assert vmx_get_rflags(vcpu) == 0x3002
    assert [vmx_get_segment(vcpu, seg).key() for seg in range(8)] == before


def test_entering_protected_mode_without_invalid_state_emulation_clears_rpl():
    real = Segment(sel=0x1003, base=0x10030, limit=0xFFFF, type=3, s=1, p=1)
    vcpu = make_vcpu("real", knobs={**RESTRICTED, "emulate_invalid_guest_state": 0}, ss=real)
    kvm_set_cr0(vcpu, vcpu.cr0 | crs.X86_CR0_PE)
    assert vmx_get_segment(vcpu, SS).selector & 3 == 0
    assert not vcpu.emulation_required


@pytest.mark.parametrize(
    ("knobs", "cpuid", "expected"),
    [
        ({"ept": 0}, {}, True),
        ({}, {}, False),
        ({"allow_smaller_maxphyaddr": 1}, {"maxphyaddr": 46}, True),
        ({"allow_smaller_maxphyaddr": 1}, {"maxphyaddr": 52}, False),
    ],
)
def test_page_faults_exit_where_kvm_has_to_look_at_them(knobs, cpuid, expected):
    vcpu = make_vcpu(knobs=knobs, kvm={"cpuid": cpuid})
    assert vmx_need_pf_intercept(vcpu) is expected
    assert bool(vcpu.vmcs.read(vf.EXCEPTION_BITMAP) >> 14 & 1) is expected
    match = vcpu.vmcs.read(vf.PAGE_FAULT_ERROR_CODE_MASK), vcpu.vmcs.read(vf.PAGE_FAULT_ERROR_CODE_MATCH)
    assert match == ((9, 1) if expected and vcpu.options.ept else (0, 0))


@pytest.mark.parametrize(
    ("kwargs", "vector"),
    [
        ({"knobs": {"enable_vmware_backdoor": 1}}, 13),
        ({"kvm": {"guest_debug": 0x10001}}, 3),
        ({"kvm": {"guest_mode": {"exception_bitmap": 1 << 7}}}, 7),
    ],
)
def test_exceptions_that_exit_on_request(kwargs, vector):
    assert make_vcpu(**kwargs).vmcs.read(vf.EXCEPTION_BITMAP) >> vector & 1
    assert not make_vcpu().vmcs.read(vf.EXCEPTION_BITMAP) >> vector & 1
