"""RDMSR and WRMSR: which MSRs exist, what they refuse, the filter and userspace."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.kvm import msr_index as mi
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.address import is_noncanonical_msr_address
from emufuzz.kvm.msr import (
    kvm_get_msr,
    kvm_get_msr_with_filter,
    kvm_msr_user_space,
    kvm_set_msr,
    kvm_set_msr_with_filter,
)
from emufuzz.kvm.msr_common import (
    KVM_MSR_RET_FILTERED,
    KVM_MSR_RET_UNSUPPORTED,
    MSR_MISC_FEATURES_ENABLES_CPUID_FAULT,
    cpuid_fault_enabled,
    supports_cpuid_fault,
)
from emufuzz.kvm.segments import get_segment_base
from emufuzz.kvm.vmx_bits import VM_ENTRY_IA32E_MODE

NONCANONICAL = 1 << 47
HIGH_HALF = 0xFFFF_8000_0000_0000
ONES = (1 << 64) - 1
UNKNOWN = 0x12345
LMA, LME, NX, SCE = crs.EFER_LMA, crs.EFER_LME, crs.EFER_NX, crs.EFER_SCE


def with_features(*names, **kwargs):
    return make_vcpu(kvm={"cpuid": {"features": dict.fromkeys(names, True)}}, **kwargs)


@pytest.mark.parametrize(
    "index", [mi.MSR_FS_BASE, mi.MSR_GS_BASE, mi.MSR_KERNEL_GS_BASE, mi.MSR_LSTAR, mi.MSR_CSTAR]
)
@pytest.mark.parametrize(("data", "result"), [(0x1234, 0), (HIGH_HALF, 0), (NONCANONICAL, 1), (1 << 63, 1)])
def test_linear_addresses_must_be_canonical(index, data, result):
    vcpu = make_vcpu()
    before = kvm_get_msr(vcpu, index)
    assert kvm_set_msr(vcpu, index, data) == result
    assert kvm_get_msr(vcpu, index) == (before if result else (0, data))
    assert (index in vcpu.msrs_written) is not bool(result)


@pytest.mark.parametrize(("host_la57", "noncanonical"), [(0, True), (1, False)])
def test_the_hosts_address_width_counts(host_la57, noncanonical):
    vcpu = make_vcpu(knobs={"host_la57": host_la57})
    assert is_noncanonical_msr_address(vcpu, 1 << 55) is noncanonical
    assert is_noncanonical_msr_address(vcpu, 1 << 56)


def test_segment_bases_are_those_of_the_segments():
    vcpu = make_vcpu()
    assert get_segment_base(vcpu, 4) == kvm_get_msr(vcpu, mi.MSR_FS_BASE)[1]
    kvm_set_msr(vcpu, mi.MSR_FS_BASE, 0xABC000)
    assert get_segment_base(vcpu, 4) == 0xABC000


@pytest.mark.parametrize(("data", "stored"), [(0x1234, 0x1234), (NONCANONICAL, HIGH_HALF), (1 << 63, 0)])
def test_sysenter_addresses_are_made_canonical(data, stored):
    vcpu = make_vcpu()
    assert not kvm_set_msr(vcpu, mi.MSR_IA32_SYSENTER_EIP, data)
    assert kvm_get_msr(vcpu, mi.MSR_IA32_SYSENTER_EIP) == (0, stored)
    assert vcpu.vmcs.read(vf.GUEST_SYSENTER_EIP) == stored


def test_sysenter_cs_has_32_bits():
    vcpu = make_vcpu()
    kvm_set_msr(vcpu, mi.MSR_IA32_SYSENTER_CS, 0x1_0000_0008)
    assert kvm_get_msr(vcpu, mi.MSR_IA32_SYSENTER_CS) == (0, 8)


@pytest.mark.parametrize(
    ("mode", "state", "data", "result", "efer"),
    [
        ("prot64", {}, SCE | LME, 0, SCE | LME | LMA),  # LMA is kept
        ("prot64", {}, LME | LMA | NX, 0, LME | LMA | NX),
        ("prot64", {}, NX, 1, None),  # LME while paging
        ("prot32", {}, LME, 1, None),
        ("real", {}, LME | LMA, 0, LME),
        ("real", {}, 1 << 12, 1, None),  # SVME
        ("real", {}, 1 << 14, 1, None),  # FFXSR
        ("real", {}, 1 << 1, 1, None),
    ],
)
def test_efer(mode, state, data, result, efer):
    vcpu = make_vcpu(mode, **state)
    before = vcpu.efer
    assert kvm_set_msr(vcpu, mi.MSR_EFER, data) == result
    assert kvm_get_msr(vcpu, mi.MSR_EFER) == (0, before if efer is None else efer)
    assert bool(vcpu.vmcs.read(vf.VM_ENTRY_CONTROLS) & VM_ENTRY_IA32E_MODE) is bool(vcpu.efer & LMA)


@pytest.mark.parametrize(("feature", "bit"), [("nx", NX), ("lm", LME)])
def test_efer_bits_need_their_feature(feature, bit):
    vcpu = make_vcpu("real", kvm={"cpuid": {"features": {feature: False}}})
    assert kvm_set_msr(vcpu, mi.MSR_EFER, bit) == 1
    assert kvm_set_msr(vcpu, mi.MSR_EFER, bit, host=True) == 0


@pytest.mark.parametrize(
    ("vendor", "data", "result", "read"),
    [("intel", 5, 0, 5), ("intel", 1 << 32, 1, 0), ("amd", 1 << 32 | 5, 0, 5)],
)
def test_tsc_aux(vendor, data, result, read):
    vcpu = make_vcpu(vendor=vendor)
    assert kvm_set_msr(vcpu, mi.MSR_TSC_AUX, data) == result
    assert kvm_get_msr(vcpu, mi.MSR_TSC_AUX) == (0, read)


def test_tsc_aux_needs_rdtscp_or_rdpid():
    vcpu = make_vcpu(kvm={"cpuid": {"features": {"rdtscp": False, "rdpid": False}}})
    assert kvm_set_msr(vcpu, mi.MSR_TSC_AUX, 1) == 1
    assert kvm_get_msr(vcpu, mi.MSR_TSC_AUX) == (1, 0)
    assert kvm_get_msr(vcpu, mi.MSR_TSC_AUX, host=True) == (0, 0)


@pytest.mark.parametrize(
    "index", [mi.MSR_STAR, mi.MSR_SYSCALL_MASK, mi.MSR_IA32_POWER_CTL, mi.MSR_IA32_MCG_STATUS]
)
def test_msrs_that_take_anything(index):
    vcpu = make_vcpu()
    assert kvm_set_msr(vcpu, index, ONES) == 0
    assert kvm_get_msr(vcpu, index) == (0, ONES)


@pytest.mark.parametrize(
    ("index", "data", "result"),
    [
        (mi.MSR_IA32_CR_PAT, 0x0007040600070406, 0),
        (mi.MSR_IA32_CR_PAT, 0x0507040600070106, 0),
        (mi.MSR_IA32_CR_PAT, 0x02, 1),
        (mi.MSR_IA32_CR_PAT, 0x03 << 56, 1),
        (mi.MSR_IA32_CR_PAT, 0x08, 1),
        (mi.MSR_K7_HWCR, 0x148, 0),
        (mi.MSR_K7_HWCR, 1 << 18, 0),
        (mi.MSR_K7_HWCR, 1, 1),
        (mi.MSR_FAM10H_MMIO_CONF_BASE, 0, 0),
        (mi.MSR_FAM10H_MMIO_CONF_BASE, 1, 1),
        (mi.MSR_IA32_APICBASE, 0xFEE00900, 0),
        (mi.MSR_IA32_APICBASE, 0, 0),
        (mi.MSR_IA32_APICBASE, 0xFEE00C00, 1),  # x2APIC is not in CPUID
        (mi.MSR_IA32_APICBASE, 0xFEE00901, 1),
        (mi.MSR_IA32_APICBASE, 1 << 52 | 0x900, 1),
        (mi.MSR_IA32_MISC_ENABLE, 0x1801 | 1 << 18, 0),
        (mi.MSR_IA32_MISC_ENABLE, 0, 1),  # read-only bits
        (mi.MSR_MISC_FEATURES_ENABLES, 1, 0),
        (mi.MSR_MISC_FEATURES_ENABLES, 2, 1),
        (mi.MSR_PLATFORM_INFO, 1 << 31, 1),
        (mi.MSR_IA32_SMBASE, 0x30000, 1),
        (mi.MSR_IA32_XSS, 0, 1),
        (mi.MSR_IA32_ARCH_CAPABILITIES, 0, 1),
        (mi.MSR_MTRRcap, 0, KVM_MSR_RET_UNSUPPORTED),
        (mi.MSR_MTRRdefType, 0xC06, 0),
        (mi.MSR_MTRRdefType, 0x1000, 1),
        (mi.MSR_MTRRdefType, 2, 1),
        (mi.MSR_MTRRfix64K_00000, 0x0606060606060606, 0),
        (mi.MSR_MTRRfix64K_00000, 0x02 << 24, 1),
        (mi.MSR_MTRRfix64K_00000 + 1, 0, 1),  # a hole
        (mi.MSR_MTRRphysBase0, 0x1006, 0),
        (mi.MSR_MTRRphysBase0, 0x1106, 1),
        (mi.MSR_MTRRphysBase0 + 1, 0xFFFFF800, 0),
        (mi.MSR_MTRRphysBase0 + 1, 1, 1),
        (mi.MSR_MTRRphysBase0 + 16, 0, 1),
        (mi.MSR_IA32_MCG_CTL, ONES, 0),
        (mi.MSR_IA32_MCG_CTL, 1, 1),
        (mi.MSR_IA32_MC0_CTL, 0, 0),
        (mi.MSR_IA32_MC0_CTL, ONES & ~(1 << 10), 0),
        (mi.MSR_IA32_MC0_CTL, 2, 1),
        (mi.MSR_IA32_MC0_CTL + 1, 1, 1),
        (mi.MSR_IA32_MC0_CTL + 2, 1, 0),
        (mi.MSR_IA32_MC0_CTL + 40, 0, 1),  # the eleventh bank
        (mi.MSR_IA32_MC0_CTL2, 0, 1),
        (mi.MSR_IA32_MCG_CAP, 0, KVM_MSR_RET_UNSUPPORTED),
        (mi.MSR_IA32_DEBUGCTLMSR, 3, 0),
        (mi.MSR_IA32_DEBUGCTLMSR, 1 << 2, 1),
        (mi.MSR_IA32_FEAT_CTL, 1, 0),
        (mi.MSR_IA32_FEAT_CTL, 4, 1),
        (mi.MSR_IA32_VMX_BASIC, 0, 1),
        (mi.MSR_IA32_UCODE_REV, 5, 0),
        (UNKNOWN, 0, KVM_MSR_RET_UNSUPPORTED),
    ],
)
def test_writes(index, data, result):
    assert kvm_set_msr(make_vcpu(), index, data) == result


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (mi.MSR_IA32_CR_PAT, (0, 0x0007040600070406)),
        (mi.MSR_MTRRcap, (0, 0x508)),
        (mi.MSR_MTRRdefType, (0, 0)),
        (mi.MSR_MTRRfix64K_00000 + 1, (1, 0)),
        (mi.MSR_IA32_APICBASE, (0, 0xFEE00900)),
        (mi.MSR_IA32_PERF_STATUS, (0, 4 << 40 | 1000)),
        (mi.MSR_FSB_FREQ, (0, 3)),
        (mi.MSR_IA32_UCODE_REV, (0, 1 << 32)),
        (mi.MSR_IA32_MISC_ENABLE, (0, 0x1801)),
        (mi.MSR_PLATFORM_INFO, (0, 1 << 31)),
        (mi.MSR_AMD64_SYSCFG, (0, 0)),
        (mi.MSR_IA32_MC0_CTL, (0, ONES)),
        (mi.MSR_IA32_MC0_CTL + 1, (0, 0)),
        (mi.MSR_IA32_MC0_CTL + 40, (1, 0)),
        (mi.MSR_IA32_MC0_CTL2, (1, 0)),
        (mi.MSR_IA32_SMBASE, (1, 0)),
        (mi.MSR_IA32_XSS, (1, 0)),
        (mi.MSR_IA32_ARCH_CAPABILITIES, (1, 0)),
        (mi.MSR_IA32_FEAT_CTL, (0, 0)),
        (mi.MSR_IA32_VMX_BASIC, (1, 0)),
        (UNKNOWN, (KVM_MSR_RET_UNSUPPORTED, 0)),
    ],
)
def test_reads(index, expected):
    assert kvm_get_msr(make_vcpu(), index) == expected


@pytest.mark.parametrize(
    ("index", "data"),
    [
        (mi.MSR_IA32_SMBASE, 0x40000),
        (mi.MSR_PLATFORM_INFO, 0),
        (mi.MSR_IA32_ARCH_CAPABILITIES, 8),
        (mi.MSR_IA32_UCODE_REV, 7),
    ],
)
def test_userspace_may_write_more(index, data):
    vcpu = make_vcpu()
    assert kvm_set_msr(vcpu, index, data, host=True) == 0
    assert kvm_get_msr(vcpu, index, host=True) == (0, data)
    assert not vcpu.msrs_written


def test_x2apic_is_entered_from_xapic_only():
    vcpu = with_features("x2apic")
    assert kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00C00) == 0
    assert kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00800) == 1
    assert kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00000) == 0
    assert not vcpu.cpuid.has("apic")
    assert kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00C00) == 1
    assert kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00400) == 1


def test_tsc_and_its_adjustment_move_together():
    vcpu = with_features("tsc_adjust")
    kvm_set_msr(vcpu, mi.MSR_IA32_TSC, 0x1000)
    assert kvm_get_msr(vcpu, mi.MSR_IA32_TSC_ADJUST) == (0, 0x1000)
    kvm_set_msr(vcpu, mi.MSR_IA32_TSC_ADJUST, 0)
    assert kvm_get_msr(vcpu, mi.MSR_IA32_TSC) == (0, 0)
    assert "CLOCK_UPDATE" in vcpu.requests
    kvm_set_msr(vcpu, mi.MSR_IA32_TSC, 5, host=True)
    assert kvm_get_msr(vcpu, mi.MSR_IA32_TSC_ADJUST) == (0, 0)
    without = make_vcpu()
    kvm_set_msr(without, mi.MSR_IA32_TSC_ADJUST, 7)
    assert kvm_get_msr(without, mi.MSR_IA32_TSC_ADJUST) == (0, 0)


def test_cpuid_faulting():
    vcpu = make_vcpu()
    assert supports_cpuid_fault(vcpu)
    assert not cpuid_fault_enabled(vcpu)
    kvm_set_msr(vcpu, mi.MSR_MISC_FEATURES_ENABLES, MSR_MISC_FEATURES_ENABLES_CPUID_FAULT)
    assert cpuid_fault_enabled(vcpu)
    assert kvm_set_msr(vcpu, mi.MSR_PLATFORM_INFO, 0, host=True) == 1
    plain = make_vcpu()
    kvm_set_msr(plain, mi.MSR_PLATFORM_INFO, 0, host=True)
    assert kvm_set_msr(plain, mi.MSR_MISC_FEATURES_ENABLES, 1) == 1


def test_platform_info_may_be_hidden():
    vcpu = make_vcpu(knobs={"platform_info_readable": 0})
    assert kvm_get_msr(vcpu, mi.MSR_PLATFORM_INFO) == (1, 0)
    assert kvm_get_msr(vcpu, mi.MSR_PLATFORM_INFO, host=True) == (0, 1 << 31)


@pytest.mark.parametrize(
    ("quirk", "features", "result"),
    [
        ("", {}, 0),
        ("misc_enable_no_mwait", {}, 0),
        ("misc_enable_no_mwait", {"xmm3": False}, 1),
    ],
)
def test_mwait_enable(quirk, features, result):
    vcpu = make_vcpu(knobs={"disabled_quirks": quirk}, kvm={"cpuid": {"features": features}})
    assert kvm_set_msr(vcpu, mi.MSR_IA32_MISC_ENABLE, 0x1801 | 1 << 18) == result
    assert vcpu.cpuid.has("mwait") is (bool(quirk) and not result)


def test_debugctl_drops_what_it_tolerates():
    vcpu = with_features("rtm", "bus_lock_detect")
    assert kvm_set_msr(vcpu, mi.MSR_IA32_DEBUGCTLMSR, 1 << 15 | 1 << 2 | 3) == 0
    assert kvm_get_msr(vcpu, mi.MSR_IA32_DEBUGCTLMSR) == (0, 1 << 15 | 1 << 2)


def test_feature_control_locks():
    vcpu = with_features("vmx")
    assert kvm_set_msr(vcpu, mi.MSR_IA32_FEAT_CTL, 5) == 0
    assert kvm_set_msr(vcpu, mi.MSR_IA32_FEAT_CTL, 0) == 1
    assert kvm_set_msr(vcpu, mi.MSR_IA32_FEAT_CTL, 0, host=True) == 0
    assert kvm_get_msr(vcpu, mi.MSR_IA32_VMX_BASIC)[0] == 0


def test_pat_also_goes_to_the_vmcs():
    vcpu = make_vcpu()
    kvm_set_msr(vcpu, mi.MSR_IA32_CR_PAT, 0x0606060606060606)
    assert vcpu.vmcs.read(vf.GUEST_IA32_PAT) == 0x0606060606060606


def test_ignored_msrs():
    vcpu = make_vcpu(knobs={"ignore_msrs": 1})
    assert kvm_get_msr(vcpu, UNKNOWN) == (0, 0)
    assert kvm_set_msr(vcpu, UNKNOWN, 5) == 0
    assert kvm_set_msr(vcpu, mi.MSR_LSTAR, NONCANONICAL) == 1


def test_filter():
    vcpu = make_vcpu(knobs={"msr_denied": "0x10,0x802"})
    assert kvm_get_msr_with_filter(vcpu, 0x10) == (KVM_MSR_RET_FILTERED, 0)
    assert kvm_set_msr_with_filter(vcpu, 0x10, 1) == KVM_MSR_RET_FILTERED
    assert kvm_get_msr(vcpu, 0x10) == (0, 0)
    assert kvm_get_msr_with_filter(vcpu, 0x802)[0] == 1  # x2APIC is not filtered
    assert kvm_get_msr_with_filter(vcpu, mi.MSR_STAR) == (0, 0)


@pytest.mark.parametrize(
    ("mask", "result", "leaves"),
    [
        (4, KVM_MSR_RET_FILTERED, True),
        (3, KVM_MSR_RET_FILTERED, False),
        (2, KVM_MSR_RET_UNSUPPORTED, True),
        (1, 1, True),
        (6, 1, False),
        (0, 1, False),
    ],
)
def test_userspace_gets_the_failures_it_asked_for(mask, result, leaves):
    vcpu = make_vcpu(knobs={"user_space_msr_mask": mask})

    def completion(_):
        return 1

    assert kvm_msr_user_space(vcpu, 0x174, None, completion, result) is leaves
    if not leaves:
        assert vcpu.complete_userspace_io is None
        return
    assert vcpu.run.exit_reason == "X86_RDMSR"
    assert vcpu.run.data == {"error": 0, "reason": mask, "index": 0x174, "data": 0}
    assert vcpu.complete_userspace_io is completion
    assert kvm_msr_user_space(vcpu, 0x174, 0x55, completion, result)
    assert (vcpu.run.exit_reason, vcpu.run.data["data"]) == ("X86_WRMSR", 0x55)


def test_control_msrs_of_features_that_the_guest_has():
    vcpu = with_features("xsaves", "arch_capabilities")
    assert kvm_set_msr(vcpu, mi.MSR_IA32_XSS, 0) == 0
    assert kvm_set_msr(vcpu, mi.MSR_IA32_XSS, 1 << 8) == 1
    assert kvm_get_msr(vcpu, mi.MSR_IA32_XSS) == (0, 0)
    assert kvm_get_msr(vcpu, mi.MSR_IA32_ARCH_CAPABILITIES) == (0, 0)


def test_machine_check_status_is_writable_where_amd_says_so():
    vcpu = make_vcpu(vendor="amd")
    assert kvm_set_msr(vcpu, mi.MSR_IA32_MC0_CTL + 1, 5) == 1
    kvm_set_msr(vcpu, mi.MSR_K7_HWCR, 1 << 18)
    assert kvm_set_msr(vcpu, mi.MSR_IA32_MC0_CTL + 1, 5) == 0
    assert kvm_get_msr(vcpu, mi.MSR_IA32_MC0_CTL + 1) == (0, 5)


@pytest.mark.parametrize("index", [mi.MSR_AMD64_NB_CFG, mi.MSR_K7_CLK_CTL, mi.MSR_P6_EVNTSEL0])
def test_writes_without_effect(index):
    vcpu = make_vcpu()
    before = kvm_get_msr(vcpu, index)
    assert kvm_set_msr(vcpu, index, 0x55) == 0
    assert kvm_get_msr(vcpu, index) == before


def test_the_local_apic_shows_in_cpuid():
    vcpu = make_vcpu()
    kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00000)
    assert not vcpu.cpuid.has("apic")
    kvm_set_msr(vcpu, mi.MSR_IA32_APICBASE, 0xFEE00800)
    assert vcpu.cpuid.has("apic")
