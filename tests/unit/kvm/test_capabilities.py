"""VMX capability MSRs (SDM Vol. 3D Appendix A) and the controls that KVM takes from them."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.kvm import msr_index as mi
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm import vmx_bits as vb
from emufuzz.kvm.capabilities import (
    CapabilityError,
    adjust_vmx_controls,
    setup_vmcs_config,
    vmx_capability_msr,
)
from emufuzz.kvm.options import KvmOptions, options_from_knobs

CONTROL_MSRS = {
    mi.MSR_IA32_VMX_PINBASED_CTLS: vf.PIN_BASED_VM_EXEC_CONTROL,
    mi.MSR_IA32_VMX_PROCBASED_CTLS: vf.CPU_BASED_VM_EXEC_CONTROL,
    mi.MSR_IA32_VMX_PROCBASED_CTLS2: vf.SECONDARY_VM_EXEC_CONTROL,
}


@pytest.mark.parametrize(
    "knobs", [{}, {"ept": 0}, {"unrestricted_guest": 0}, {"vpid": 0, "vnmi": 0}, {"irqchip": 1}]
)
def test_the_controls_of_a_vcpu_are_allowed(knobs):
    vcpu = make_vcpu(knobs=knobs)
    for index, field in CONTROL_MSRS.items():
        capability = vmx_capability_msr(vcpu.options, index)
        must, may = capability & 0xFFFFFFFF, capability >> 32
        value = vcpu.vmcs.read(field)
        assert must & ~may == 0
        assert value & ~may == 0
        if index != mi.MSR_IA32_VMX_PROCBASED_CTLS:  # CR3 exits are default1 without the TRUE MSRs
            assert must & ~value == 0


@pytest.mark.parametrize(
    ("knobs", "control", "on"),
    [
        ({}, vb.SECONDARY_EXEC_ENABLE_EPT, True),
        ({"ept": 0}, vb.SECONDARY_EXEC_ENABLE_EPT, False),
        ({}, vb.SECONDARY_EXEC_UNRESTRICTED_GUEST, True),
        ({"unrestricted_guest": 0}, vb.SECONDARY_EXEC_UNRESTRICTED_GUEST, False),
        ({}, vb.SECONDARY_EXEC_ENABLE_VPID, True),
        ({"vpid": 0}, vb.SECONDARY_EXEC_ENABLE_VPID, False),
        ({}, vb.SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES, False),
        ({"irqchip": 1}, vb.SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES, True),
        ({"irqchip": 1, "flexpriority": 0}, vb.SECONDARY_EXEC_VIRTUALIZE_APIC_ACCESSES, False),
        ({}, vb.SECONDARY_EXEC_DESC, False),
        ({}, vb.SECONDARY_EXEC_ENABLE_RDTSCP, True),
        ({}, vb.SECONDARY_EXEC_RDRAND_EXITING, True),
        ({}, vb.SECONDARY_EXEC_WBINVD_EXITING, True),
    ],
)
def test_secondary_controls(knobs, control, on):
    assert bool(make_vcpu(knobs=knobs).vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) & control) is on


@pytest.mark.parametrize(
    ("knobs", "control", "on"),
    [
        ({}, vb.CPU_BASED_CR3_LOAD_EXITING, False),
        ({"ept": 0}, vb.CPU_BASED_CR3_LOAD_EXITING, True),
        ({"ept": 0}, vb.CPU_BASED_INVLPG_EXITING, True),
        ({}, vb.CPU_BASED_INVLPG_EXITING, False),
        ({}, vb.CPU_BASED_CR8_LOAD_EXITING, True),
        ({"irqchip": 1}, vb.CPU_BASED_CR8_LOAD_EXITING, False),
        ({"irqchip": 1}, vb.CPU_BASED_TPR_SHADOW, True),
        ({}, vb.CPU_BASED_HLT_EXITING, True),
        ({"hlt_in_guest": 1}, vb.CPU_BASED_HLT_EXITING, False),
        ({"mwait_in_guest": 1}, vb.CPU_BASED_MWAIT_EXITING, False),
        ({}, vb.CPU_BASED_UNCOND_IO_EXITING, True),
        ({}, vb.CPU_BASED_MOV_DR_EXITING, True),
        ({}, vb.CPU_BASED_RDTSC_EXITING, False),
    ],
)
def test_primary_controls(knobs, control, on):
    assert bool(make_vcpu(knobs=knobs).vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & control) is on


@pytest.mark.parametrize(
    ("feature", "control", "on"),
    [
        ("rdrand", vb.SECONDARY_EXEC_RDRAND_EXITING, False),
        ("rdseed", vb.SECONDARY_EXEC_RDSEED_EXITING, False),
        ("invpcid", vb.SECONDARY_EXEC_ENABLE_INVPCID, True),
        ("xsaves", vb.SECONDARY_EXEC_ENABLE_XSAVES, True),
    ],
)
def test_features_decide_controls(feature, control, on):
    with_it = make_vcpu(kvm={"cpuid": {"features": {feature: True}}})
    assert bool(with_it.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) & control) is on
    assert bool(make_vcpu().vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) & control) is not on


def test_vpid_is_a_tag():
    assert make_vcpu(knobs={"vpid": 7}).vmcs.read(vf.VIRTUAL_PROCESSOR_ID) == 7


def test_posted_interrupts_need_apicv():
    config = setup_vmcs_config(KvmOptions())
    assert config.pin_based_exec_ctrl & vb.PIN_BASED_POSTED_INTR
    assert not make_vcpu().vmcs.read(vf.PIN_BASED_VM_EXEC_CONTROL) & vb.PIN_BASED_POSTED_INTR
    apicv = make_vcpu(knobs={"enable_apicv": 1, "irqchip": 1})
    assert apicv.vmcs.read(vf.PIN_BASED_VM_EXEC_CONTROL) & vb.PIN_BASED_POSTED_INTR


def test_adjustment():
    assert adjust_vmx_controls(0b001, 0b110, 0b011 << 32 | 0b001) == 0b011
    with pytest.raises(CapabilityError, match="0x4 are required"):
        adjust_vmx_controls(0b100, 0, 0b011 << 32)


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (mi.MSR_IA32_VMX_CR0_FIXED0, 0x80000021),
        (mi.MSR_IA32_VMX_CR4_FIXED0, 0x2000),
        (mi.MSR_IA32_VMX_VMFUNC, 0),
    ],
)
def test_fixed_values(index, value):
    assert vmx_capability_msr(KvmOptions(), index) == value


def test_ept_capabilities_follow_the_knobs():
    def capability(knobs):
        return vmx_capability_msr(options_from_knobs(knobs), mi.MSR_IA32_VMX_EPT_VPID_CAP)

    assert capability({"ept": 0, "vpid": 0}) == 0
    assert capability({}) & 0xFFFFFFFF
    assert capability({"vpid": 0}) >> 32 == 0
