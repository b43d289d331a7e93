"""RDMSR and WRMSR: canonical checks, VMX's own MSRs, the userspace filter and its exits.

KVM: __kvm_get_msr, __kvm_set_msr, kvm_do_msr_access, kvm_msr_allowed, kvm_get_msr_with_filter,
kvm_set_msr_with_filter, kvm_msr_user_space, vmx_get_msr, vmx_set_msr. SDM Vol. 4.
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import msr_index as mi
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.address import canonical_address, is_noncanonical_msr_address, max_host_virt_addr_bits
from emufuzz.kvm.capabilities import VMX_MSRS, vmx_capability_msr
from emufuzz.kvm.lapic import X2APIC_MSRS
from emufuzz.kvm.msr_common import (
    KVM_MSR_RET_FILTERED,
    KVM_MSR_RET_UNSUPPORTED,
    kvm_get_msr_common,
    kvm_set_msr_common,
)
from emufuzz.kvm.options import (
    KVM_MSR_EXIT_REASON_FILTER,
    KVM_MSR_EXIT_REASON_INVAL,
    KVM_MSR_EXIT_REASON_UNKNOWN,
)
from emufuzz.kvm.segments import vmx_segment_cache_clear
from emufuzz.kvm.vcpu import KVM_EXIT_X86_RDMSR, KVM_EXIT_X86_WRMSR, CompleteUserspaceIo, Vcpu

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1

#: MSRs that hold linear addresses and refuse non-canonical ones.
_CANONICAL: Final = frozenset(
    {mi.MSR_FS_BASE, mi.MSR_GS_BASE, mi.MSR_KERNEL_GS_BASE, mi.MSR_CSTAR, mi.MSR_LSTAR}
)
#: MSRs that live in the VMCS.
_VMCS_MSRS: Final = {
    mi.MSR_FS_BASE: vf.GUEST_FS_BASE,
    mi.MSR_GS_BASE: vf.GUEST_GS_BASE,
    mi.MSR_IA32_SYSENTER_CS: vf.GUEST_SYSENTER_CS,
    mi.MSR_IA32_SYSENTER_EIP: vf.GUEST_SYSENTER_EIP,
    mi.MSR_IA32_SYSENTER_ESP: vf.GUEST_SYSENTER_ESP,
    mi.MSR_IA32_DEBUGCTLMSR: vf.GUEST_IA32_DEBUGCTL,
}
#: MSRs that the host lends to the guest and takes back on return to userspace.
_URET_MSRS: Final = frozenset(
    {mi.MSR_STAR, mi.MSR_LSTAR, mi.MSR_CSTAR, mi.MSR_SYSCALL_MASK, mi.MSR_TSC_AUX, mi.MSR_KERNEL_GS_BASE}
)

_FEAT_CTL_LOCKED: Final = 1 << 0
_FEAT_CTL_VMX_OUTSIDE_SMX: Final = 1 << 2

_DEBUGCTL_LBR: Final = 1 << 0
_DEBUGCTL_BTF: Final = 1 << 1
_DEBUGCTL_BUS_LOCK_DETECT: Final = 1 << 2
_DEBUGCTL_RTM: Final = 1 << 15

_EXIT_REASON: Final = {
    KVM_MSR_RET_UNSUPPORTED: KVM_MSR_EXIT_REASON_UNKNOWN,
    KVM_MSR_RET_FILTERED: KVM_MSR_EXIT_REASON_FILTER,
}


# -- VMX ---------------------------------------------------------------------------------------


def vmx_get_msr(vcpu: Vcpu, index: int, *, host: bool = False) -> tuple[int, int]:
    """(0, value), (1, 0) for #GP, or (KVM_MSR_RET_UNSUPPORTED, 0)."""
    field = _VMCS_MSRS.get(index)
    if field is not None:
        return 0, vcpu.vmcs.values[field]
    if index in _URET_MSRS or index == mi.MSR_IA32_FEAT_CTL:
        return 0, vcpu.msrs.get(index, 0)
    if index in VMX_MSRS:
        if not vcpu.cpuid.has("vmx"):
            return 1, 0
        return 0, vmx_capability_msr(vcpu.options, index)
    return kvm_get_msr_common(vcpu, index, host=host)


def vmx_set_msr(vcpu: Vcpu, index: int, data: int, *, host: bool = False) -> int:
    """0, 1 for #GP, or KVM_MSR_RET_UNSUPPORTED."""
    if index == mi.MSR_IA32_DEBUGCTLMSR:
        return _set_debugctl(vcpu, data)
    field = _VMCS_MSRS.get(index)
    if field is not None:
        if index in (mi.MSR_FS_BASE, mi.MSR_GS_BASE):
            vmx_segment_cache_clear(vcpu)
        vcpu.vmcs.write(field, data)
        return 0
    if index in _URET_MSRS:
        vcpu.msrs[index] = data
        return 0
    if index == mi.MSR_IA32_FEAT_CTL:
        return _set_feat_ctl(vcpu, data, host=host)
    if index in VMX_MSRS:
        return 1
    result = kvm_set_msr_common(vcpu, index, data, host=host)
    if index == mi.MSR_IA32_CR_PAT and not result:
        vcpu.vmcs.write(vf.GUEST_IA32_PAT, data)
    return result


def _set_debugctl(vcpu: Vcpu, data: int) -> int:
    """BTF and LBR are accepted and dropped (KVM: vmx_is_valid_debugctl)."""
    supported = 0
    if vcpu.cpuid.has("bus_lock_detect"):
        supported |= _DEBUGCTL_BUS_LOCK_DETECT
    if vcpu.cpuid.has("rtm"):
        supported |= _DEBUGCTL_RTM
    if data & ~(supported | _DEBUGCTL_BTF | _DEBUGCTL_LBR):
        return 1
    vcpu.vmcs.write(vf.GUEST_IA32_DEBUGCTL, data & supported)
    return 0


def _set_feat_ctl(vcpu: Vcpu, data: int, *, host: bool) -> int:
    """Once locked, IA32_FEATURE_CONTROL is userspace's alone (KVM: is_vmx_feature_control_msr_valid)."""
    locked = vcpu.msrs.get(mi.MSR_IA32_FEAT_CTL, 0) & _FEAT_CTL_LOCKED
    valid = _FEAT_CTL_LOCKED
    if vcpu.cpuid.has("vmx"):
        valid |= _FEAT_CTL_VMX_OUTSIDE_SMX
    if (locked and not host) or data & ~valid:
        return 1
    vcpu.msrs[mi.MSR_IA32_FEAT_CTL] = data
    return 0


# -- common entry ------------------------------------------------------------------------------


def _tsc_aux_exists(vcpu: Vcpu) -> bool:
    return vcpu.cpuid.has("rdtscp") or vcpu.cpuid.has("rdpid")


def kvm_get_msr(vcpu: Vcpu, index: int, *, host: bool = False) -> tuple[int, int]:
    """Read an MSR without the filter: (result, value), the value being 0 unless the result is 0."""
    if index == mi.MSR_TSC_AUX and not host and not _tsc_aux_exists(vcpu):
        return 1, 0
    result, data = vmx_get_msr(vcpu, index, host=host)
    if result == KVM_MSR_RET_UNSUPPORTED and vcpu.options.ignore_msrs:
        return 0, 0
    return result, data


def kvm_set_msr(vcpu: Vcpu, index: int, data: int, *, host: bool = False) -> int:
    """Write an MSR without the filter: 0, 1 for #GP, or KVM_MSR_RET_UNSUPPORTED."""
    if index in _CANONICAL:
        if is_noncanonical_msr_address(vcpu, data):
            return 1
    elif index in (mi.MSR_IA32_SYSENTER_EIP, mi.MSR_IA32_SYSENTER_ESP):
        # KVM deviation: made canonical where SDM Vol. 4 has #GP
        data = canonical_address(data, max_host_virt_addr_bits(vcpu))
    elif index == mi.MSR_TSC_AUX:
        if not host and not _tsc_aux_exists(vcpu):
            return 1
        if vcpu.cpuid.intel_compatible and data >> 32:
            return 1
        data &= _MASK32
    result = vmx_set_msr(vcpu, index, data, host=host)
    if result == KVM_MSR_RET_UNSUPPORTED and vcpu.options.ignore_msrs:
        return 0
    if not result and not host:
        vcpu.msrs_written.add(index)
    return result


def kvm_msr_allowed(vcpu: Vcpu, index: int) -> bool:
    """The userspace filter lets the guest at this MSR; x2APIC cannot be filtered."""
    return index not in vcpu.options.msr_denied or index in X2APIC_MSRS


def kvm_get_msr_with_filter(vcpu: Vcpu, index: int) -> tuple[int, int]:
    """RDMSR by the guest: (result, value)."""
    if not kvm_msr_allowed(vcpu, index):
        return KVM_MSR_RET_FILTERED, 0
    return kvm_get_msr(vcpu, index)


def kvm_set_msr_with_filter(vcpu: Vcpu, index: int, data: int) -> int:
    """WRMSR by the guest: 0, 1 for #GP, KVM_MSR_RET_UNSUPPORTED or KVM_MSR_RET_FILTERED."""
    if not kvm_msr_allowed(vcpu, index):
        return KVM_MSR_RET_FILTERED
    return kvm_set_msr(vcpu, index, data)


def kvm_msr_user_space(
    vcpu: Vcpu, index: int, data: int | None, completion: CompleteUserspaceIo, result: int
) -> bool:
    """Leave a failed MSR access to userspace, if that has asked for such failures.

    Args:
        vcpu: the vCPU.
        index: the MSR.
        data: what WRMSR was to store; None for RDMSR.
        completion: what goes on at the next KVM_RUN, with userspace's `error` and `data` in `run.data`.
        result: the failed access's result.

    Returns:
        Whether `vcpu.run` now holds the exit; if not, the caller raises #GP.
    """
    reason = _EXIT_REASON.get(result, KVM_MSR_EXIT_REASON_INVAL)
    if not vcpu.options.user_space_msr_mask & reason:
        return False
    exit_reason = KVM_EXIT_X86_RDMSR if data is None else KVM_EXIT_X86_WRMSR
    vcpu.run.leave(exit_reason, error=0, reason=reason, index=index, data=data or 0)
    vcpu.complete_userspace_io = completion
    return True
