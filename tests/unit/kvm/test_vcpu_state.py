"""Cases into vCPUs and back."""

from __future__ import annotations

import msgspec
import pytest
from support.vcpus import Hooks, make_vcpu

from emufuzz.arch.regs import VCPU_SREG_GS
from emufuzz.case.build import build_case, build_system
from emufuzz.case.catalogue import catalogue
from emufuzz.case.model import UNUSABLE, Segment
from emufuzz.kvm import msr_index as mi
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.cpuid import CpuidError
from emufuzz.kvm.cr import kvm_set_cr0
from emufuzz.kvm.guest_state import vmx_set_segment
from emufuzz.kvm.hooks import IsolatedHooks
from emufuzz.kvm.msr import kvm_set_msr
from emufuzz.kvm.options import OptionsError
from emufuzz.kvm.regs import kvm_rip_read, vmx_after_exit, vmx_before_entry
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import vmx_get_segment
from emufuzz.kvm.state import gpr_of, segment_in, segment_out, to_system, vcpu_of_case
from emufuzz.kvm.vcpu import GuestMode

MODES = ("real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64")
KNOBS = (
    {},
    {"unrestricted_guest": 0},
    {"ept": 0},
    {"unrestricted_guest": 0, "emulate_invalid_guest_state": 0},
)


def load(case, knobs):
    kvm = {**(case.extra or {}).get("kvm", {}), "knobs": knobs}
    case = msgspec.structs.replace(case, extra={**(case.extra or {}), "kvm": kvm})
    vcpu = vcpu_of_case(case, Hooks())
    vmx_before_entry(vcpu)
    vmx_after_exit(vcpu)
    return vcpu


@pytest.mark.parametrize("knobs", KNOBS, ids=["urg", "no-urg", "no-ept", "no-emulation"])
@pytest.mark.parametrize("name", sorted(catalogue()))
def test_a_case_comes_back_unchanged_after_an_entry_and_an_exit(name, knobs):
    case = catalogue()[name]
    vcpu = load(case, knobs)
    assert to_system(vcpu, case.system) is case.system
    assert gpr_of(vcpu) == list(case.gpr)
    assert kvm_rip_read(vcpu) == case.rip
    assert vmx_get_rflags(vcpu) == case.rflags | 2
    assert not vcpu.requests


def test_changes_show_and_only_those():
    before = build_system("prot32", msr=((mi.MSR_IA32_SYSENTER_CS, 8), (0x12345, 9)))
    vcpu = load(build_case("prot32", b"\x90", system=before), {})
    kvm_set_msr(vcpu, mi.MSR_STAR, 7)
    kvm_set_cr0(vcpu, before.cr0 | 8)
    var = vmx_get_segment(vcpu, 3)
    var.selector = 0x1B
    vmx_set_segment(vcpu, var, 3)
    vcpu.cr2 = 0x99
    after = to_system(vcpu, before)
    assert after.cr0 == before.cr0 | 8
    assert after.cr2 == 0x99
    assert after.msr == ((mi.MSR_IA32_SYSENTER_CS, 8), (0x12345, 9), (mi.MSR_STAR, 7))
    assert after.seg[3].sel == 0x1B
    assert [i for i in range(8) if after.seg[i] is not before.seg[i]] == [3]
    assert (after.gdtr, after.cr4, after.dr, after.fpu) == (before.gdtr, before.cr4, before.dr, before.fpu)


def test_msrs_of_the_case_are_loaded():
    msr = ((mi.MSR_IA32_TSC, 0x1000), (mi.MSR_LSTAR, 0xFFFF800000001000), (mi.MSR_KERNEL_GS_BASE, 0x5000))
    case = build_case("prot64", b"\x90", system=build_system("prot64", msr=msr))
    vcpu = load(case, {})
    assert to_system(vcpu, case.system) is case.system
    assert vcpu.msrs[mi.MSR_KERNEL_GS_BASE] == 0x5000


def test_machine_around_the_registers():
    kvm = {"smm": True, "pkru": 0x55555554, "interruptibility": 2, "guest_mode": {"intercepts": ["hlt"]}}
    vcpu = make_vcpu(kvm=kvm)
    assert vcpu.smm
    assert vcpu.pkru == 0x55555554
    assert vcpu.vmcs.read(vf.GUEST_INTERRUPTIBILITY_INFO) == 2
    assert vcpu.guest_mode.intercepts == {"hlt"}
    assert make_vcpu(kvm={"guest_mode": True}).guest_mode is not None
    assert make_vcpu(kvm={"guest_mode": False}).guest_mode is None


def test_a_cpu_has_the_features_that_its_cr4_shows():
    vcpu = make_vcpu("prot32", cr4=1 << 20)
    assert vcpu.cpuid.has("smep")
    assert not make_vcpu("prot32").cpuid.has("smep")


@pytest.mark.parametrize(
    ("kvm", "error", "message"),
    [
        ({"guest_mode": 5}, OptionsError, "kvm.guest_mode"),
        ({"guest_mode": {"intercepts": 5}}, OptionsError, "kvm.guest_mode"),
        ({"guest_mode": {"intercepts": ["io", "oi"]}}, OptionsError, "kvm.guest_mode.intercepts: 'oi'"),
        ({"guest_debug": "on"}, OptionsError, "kvm.guest_debug"),
        ({"guest_debug": {"control": 1, "dr": [1]}}, OptionsError, "eight values"),
        ({"guest_debug": {"control": 1, "dr": ["x"] * 8}}, OptionsError, "not a number"),
        ({"cpuid": 5}, CpuidError, "kvm.cpuid"),
    ],
)
def test_malformed(kvm, error, message):
    with pytest.raises(error, match=message):
        make_vcpu(kvm=kvm)


def test_a_failed_pdpte_load_leaves_no_mapping():
    vcpu = make_vcpu("prot32", cr4=1 << 5)
    assert vcpu.pdptrs == [0, 0, 0, 0]


@pytest.mark.parametrize(
    "seg", [UNUSABLE, Segment(sel=8, base=1 << 40, limit=0xFFFFF, type=11, s=1, dpl=3, p=1, avl=1, l=1, g=1)]
)
def test_segments_convert_both_ways(seg):
    assert segment_out(segment_in(seg)) == seg


@pytest.mark.parametrize("selector", [0, 1, 3])
@pytest.mark.parametrize("knobs", KNOBS, ids=["urg", "no-urg", "no-ept", "no-emulation"])
def test_the_accessed_bit_of_an_unusable_segment_does_not_show(knobs, selector):
    """Of its access rights hardware keeps nothing else (SDM Vol. 3C 27.3.2)."""
    before = build_system("prot32")
    vcpu = load(build_case("prot32", b"\x90", system=before), knobs)
    null = Segment(sel=selector)
    vmx_set_segment(vcpu, segment_in(null), VCPU_SREG_GS)
    assert to_system(vcpu, before).seg[VCPU_SREG_GS] == null


@pytest.mark.parametrize("rights", [{"type": 2}, {"dpl": 3}, {"limit": 1}, {"db": 1}])
def test_other_rights_of_an_unusable_segment_show(rights):
    shown = Segment(**{"sel": 1, "type": 1, **rights})
    assert segment_out(segment_in(shown)) == shown


def test_requests_are_taken_once():
    vcpu = make_vcpu()
    vcpu.make_request("EVENT")
    assert vcpu.check_request("EVENT")
    assert not vcpu.check_request("EVENT")


def test_an_isolated_vcpu_has_nothing_around_it():
    hooks = IsolatedHooks()
    hooks.mmu_reset_context()
    hooks.mmu_new_pgd(0)
    hooks.mmu_invalidate_addr(0)
    hooks.invalidate_pcid(0)
    assert dict(hooks.calls) == dict.fromkeys(
        ("mmu_reset_context", "mmu_new_pgd", "mmu_invalidate_addr", "invalidate_pcid"), 1
    )
    assert hooks.read_pdptes(0) is None
    assert not hooks.emulate_int_real(8, 0)
    assert hooks.emulate_skip() == 0


@pytest.mark.parametrize(("value", "nested"), [(None, False), (False, False), (True, True), ({}, True)])
def test_an_empty_object_is_a_nested_guest_of_which_nothing_is_intercepted(value, nested):
    assert (make_vcpu(kvm={"guest_mode": value}).guest_mode == GuestMode()) is nested
