"""MSRs that Intel and AMD hosts handle alike (KVM: kvm_get_msr_common, kvm_set_msr_common).

Left out, and therefore unknown to the guest: the virtual PMU, SGX, Processor Trace, Xen, and
the paravirtual MSRs that start host services.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.kvm import mce, mtrr
from emufuzz.kvm import msr_index as mi
from emufuzz.kvm.cr import kvm_update_cpuid_runtime, vmx_set_efer
from emufuzz.kvm.hyperv_msr import kvm_hv_get_msr_common, kvm_hv_set_msr_common
from emufuzz.kvm.hyperv_regs import HV_MSRS
from emufuzz.kvm.lapic import X2APIC_MSRS, apic_base_changed, kvm_x2apic_msr_read, kvm_x2apic_msr_write
from emufuzz.kvm.lapic_timer import kvm_get_lapic_tscdeadline_msr, kvm_set_lapic_tscdeadline_msr
from emufuzz.kvm.regs import is_paging
from emufuzz.kvm.vcpu import IA32_PAT_RESET, KVM_REQ_CLOCK_UPDATE, Vcpu

#: Results beside 0 (done) and 1 (#GP): the MSR is unknown; the filter refuses it.
KVM_MSR_RET_UNSUPPORTED: Final = 2
KVM_MSR_RET_FILTERED: Final = 3

#: EFER bits that KVM offers on Intel hosts, whatever the guest's vendor.
EFER_KNOWN: Final = crs.EFER_SCE | crs.EFER_LME | crs.EFER_LMA | crs.EFER_NX

MSR_PLATFORM_INFO_CPUID_FAULT: Final = 1 << 31
MSR_MISC_FEATURES_ENABLES_CPUID_FAULT: Final = 1
MSR_IA32_MISC_ENABLE_EMON: Final = 1 << 7
MSR_IA32_MISC_ENABLE_PMU_RO_MASK: Final = 1 << 11 | 1 << 12  # BTS_UNAVAIL, PEBS_UNAVAIL
MSR_IA32_MISC_ENABLE_MWAIT: Final = 1 << 18
APICBASE_ENABLE: Final = 1 << 11
X2APIC_ENABLE: Final = 1 << 10

_MASK64: Final = (1 << 64) - 1
_HWCR_IGNORED: Final = 0x40 | 0x100 | 0x8
_HWCR_KNOWN: Final = 1 << 18 | 1 << 24

# fmt: off
#: MSRs that read as 0, whatever was written.
_ZEROS: Final = frozenset({
    mi.MSR_IA32_PLATFORM_ID, mi.MSR_EBL_CR_POWERON, mi.MSR_IA32_LASTBRANCHFROMIP,
    mi.MSR_IA32_LASTBRANCHTOIP, mi.MSR_IA32_LASTINTFROMIP, mi.MSR_IA32_LASTINTTOIP,
    mi.MSR_AMD64_SYSCFG, mi.MSR_K8_TSEG_ADDR, mi.MSR_K8_TSEG_MASK, mi.MSR_VM_HSAVE_PA,
    mi.MSR_K8_INT_PENDING_MSG, mi.MSR_AMD64_NB_CFG, mi.MSR_FAM10H_MMIO_CONF_BASE,
    mi.MSR_AMD64_BU_CFG2, mi.MSR_IA32_PERF_CTL, mi.MSR_AMD64_DC_CFG, mi.MSR_AMD64_TW_CFG,
    mi.MSR_F15H_EX_CFG, mi.MSR_RAPL_POWER_UNIT, mi.MSR_PP0_ENERGY_STATUS, mi.MSR_PP1_ENERGY_STATUS,
    mi.MSR_PKG_ENERGY_STATUS, mi.MSR_DRAM_ENERGY_STATUS, mi.MSR_IA32_P5_MC_ADDR, mi.MSR_IA32_P5_MC_TYPE,
    *range(mi.MSR_K7_EVNTSEL0, mi.MSR_K7_EVNTSEL0 + 8), mi.MSR_P6_PERFCTR0, mi.MSR_P6_PERFCTR1,
    mi.MSR_P6_EVNTSEL0, mi.MSR_P6_EVNTSEL1,
})
#: MSRs with one value for ever.
_CONSTANTS: Final = {
    mi.MSR_FSB_FREQ:         3,
    mi.MSR_EBC_FREQUENCY_ID: 1 << 24,
    mi.MSR_IA32_PERF_STATUS: 4 << 40 | 1000,
    mi.MSR_K7_CLK_CTL:       0x20000000,
    mi.MSR_IA32_BBL_CR_CTL3: 0xBE702111,
    mi.MSR_IA32_MCG_CAP:     mce.MCG_CAP,
}
#: MSRs that hold what was stored -> their value at reset.
_STORED: Final = {
    mi.MSR_IA32_CR_PAT:           IA32_PAT_RESET,
    mi.MSR_IA32_UCODE_REV:        0x100000000,
    mi.MSR_IA32_POWER_CTL:        0,
    mi.MSR_IA32_TSC:              0,
    mi.MSR_IA32_TSC_ADJUST:       0,
    mi.MSR_IA32_MISC_ENABLE:      MSR_IA32_MISC_ENABLE_PMU_RO_MASK | 1 << 0,
    mi.MSR_MISC_FEATURES_ENABLES: 0,
    mi.MSR_K7_HWCR:               0,
    mi.MSR_IA32_MCG_STATUS:       0,
}
#: MSRs whose writes change nothing.
_WRITE_IGNORED: Final = frozenset({
    mi.MSR_AMD64_NB_CFG, mi.MSR_IA32_UCODE_WRITE, mi.MSR_VM_HSAVE_PA, mi.MSR_AMD64_PATCH_LOADER,
    mi.MSR_AMD64_BU_CFG2, mi.MSR_AMD64_DC_CFG, mi.MSR_AMD64_TW_CFG, mi.MSR_F15H_EX_CFG,
    mi.MSR_K7_CLK_CTL, mi.MSR_IA32_BBL_CR_CTL3,
    *range(mi.MSR_K7_EVNTSEL0, mi.MSR_K7_EVNTSEL0 + 8), mi.MSR_P6_PERFCTR0, mi.MSR_P6_PERFCTR1,
    mi.MSR_P6_EVNTSEL0, mi.MSR_P6_EVNTSEL1,
})
# fmt: on


def kvm_get_msr_common(vcpu: Vcpu, index: int, *, host: bool) -> tuple[int, int]:
    """(0, value), (1, 0) for #GP, or (KVM_MSR_RET_UNSUPPORTED, 0); `host`: userspace asks."""
    stored = _STORED.get(index)
    if stored is not None:
        return 0, vcpu.msrs.get(index, stored)
    if index in _ZEROS:
        return 0, 0
    if index in _CONSTANTS:
        return 0, _CONSTANTS[index]
    if index == mi.MSR_EFER:
        return 0, vcpu.efer
    if index == mi.MSR_IA32_APICBASE:
        return 0, vcpu.apic_base
    if mtrr.is_mtrr(index):
        return mtrr.kvm_mtrr_get_msr(vcpu, index)
    if index in X2APIC_MSRS:
        return kvm_x2apic_msr_read(vcpu, index)
    if index in HV_MSRS:
        return kvm_hv_get_msr_common(vcpu, index, host=host)
    reader = _READERS.get(index)
    if reader is not None:
        return reader(vcpu, host)
    if mce.is_mce(index):
        return mce.get_msr_mce(vcpu, index)
    return KVM_MSR_RET_UNSUPPORTED, 0


def _get_platform_info(vcpu: Vcpu, host: bool) -> tuple[int, int]:
    if not host and not vcpu.options.platform_info_readable:
        return 1, 0
    return 0, vcpu.msrs.get(mi.MSR_PLATFORM_INFO, MSR_PLATFORM_INFO_CPUID_FAULT)


def _get_smbase(vcpu: Vcpu, host: bool) -> tuple[int, int]:
    return (0, vcpu.smbase) if host else (1, 0)


def _get_xss(vcpu: Vcpu, host: bool) -> tuple[int, int]:
    if not host and not vcpu.cpuid.has("xsaves"):
        return 1, 0
    return 0, vcpu.msrs.get(mi.MSR_IA32_XSS, 0)


def _get_arch_capabilities(vcpu: Vcpu, host: bool) -> tuple[int, int]:
    if not host and not vcpu.cpuid.has("arch_capabilities"):
        return 1, 0
    return 0, vcpu.msrs.get(mi.MSR_IA32_ARCH_CAPABILITIES, 0)


def _get_tsc_deadline(vcpu: Vcpu, host: bool) -> tuple[int, int]:  # noqa: ARG001 - readers have one signature
    return 0, kvm_get_lapic_tscdeadline_msr(vcpu)


_READERS: Final[dict[int, Callable[[Vcpu, bool], tuple[int, int]]]] = {
    mi.MSR_PLATFORM_INFO: _get_platform_info,
    mi.MSR_IA32_SMBASE: _get_smbase,
    mi.MSR_IA32_XSS: _get_xss,
    mi.MSR_IA32_ARCH_CAPABILITIES: _get_arch_capabilities,
    mi.MSR_IA32_TSC_DEADLINE: _get_tsc_deadline,
}


def kvm_set_msr_common(vcpu: Vcpu, index: int, data: int, *, host: bool) -> int:
    """0, 1 for #GP, or KVM_MSR_RET_UNSUPPORTED; `host`: userspace writes, with fewer checks."""
    if index in _WRITE_IGNORED:
        return 0
    writer = _WRITERS.get(index)
    if writer is not None:
        return writer(vcpu, data, host)
    if mtrr.is_mtrr(index) and index != mi.MSR_MTRRcap:
        return mtrr.kvm_mtrr_set_msr(vcpu, index, data)
    if mce.is_mce(index):
        return mce.set_msr_mce(vcpu, index, data, host=host)
    if index in X2APIC_MSRS:
        return kvm_x2apic_msr_write(vcpu, index, data)
    if index in HV_MSRS:
        return kvm_hv_set_msr_common(vcpu, index, data, host=host)
    if index in (mi.MSR_IA32_POWER_CTL, mi.MSR_IA32_MCG_STATUS):
        vcpu.msrs[index] = data
        return 0
    return KVM_MSR_RET_UNSUPPORTED


def _set_efer(vcpu: Vcpu, efer: int, host: bool) -> int:
    """KVM: set_efer; LMA is kept, LME cannot change while paging (SDM Vol. 3A 9.8.5)."""
    if efer & ~EFER_KNOWN:
        return 1
    if not host and not _valid_efer(vcpu, efer):
        return 1
    if not host and is_paging(vcpu) and (vcpu.efer ^ efer) & crs.EFER_LME:
        return 1
    old = vcpu.efer
    efer = efer & ~crs.EFER_LMA | old & crs.EFER_LMA
    vmx_set_efer(vcpu, efer)
    if (efer ^ old) & (crs.EFER_LME | crs.EFER_NX):
        vcpu.hooks.mmu_reset_context()
    return 0


def _valid_efer(vcpu: Vcpu, efer: int) -> bool:
    """KVM: __kvm_valid_efer, the bits need their CPUID features."""
    if efer & (crs.EFER_LME | crs.EFER_LMA) and not vcpu.cpuid.has("lm"):
        return False
    return not efer & crs.EFER_NX or vcpu.cpuid.has("nx")


def _set_hwcr(vcpu: Vcpu, data: int, host: bool) -> int:  # noqa: ARG001 - writers have one signature
    data &= ~_HWCR_IGNORED
    if data & ~_HWCR_KNOWN:
        return 1
    vcpu.msrs[mi.MSR_K7_HWCR] = data
    return 0


def _set_mmio_conf_base(vcpu: Vcpu, data: int, host: bool) -> int:  # noqa: ARG001 - as above
    return 1 if data else 0


def _set_pat(vcpu: Vcpu, data: int, host: bool) -> int:  # noqa: ARG001 - as above
    """Memory types 0, 1, 4..7 only (SDM Vol. 3A 11.12.2)."""
    if data & 0xF8F8F8F8F8F8F8F8 or (data | (data & 0x0202020202020202) << 1) & _MASK64 != data:
        return 1
    vcpu.msrs[mi.MSR_IA32_CR_PAT] = data
    return 0


def _apic_mode(apic_base: int) -> int:
    return apic_base & (APICBASE_ENABLE | X2APIC_ENABLE)


def _set_apic_base(vcpu: Vcpu, data: int, host: bool) -> int:
    """KVM: kvm_apic_set_base; x2APIC only from xAPIC, and back only by way of disabled."""
    reserved = vcpu.cpuid.reserved_gpa_bits | 0x2FF
    if not vcpu.cpuid.has("x2apic"):
        reserved |= X2APIC_ENABLE
    old_mode, new_mode = _apic_mode(vcpu.apic_base), _apic_mode(data)
    if data & reserved or new_mode == X2APIC_ENABLE:
        return 1
    if not host:
        if old_mode == APICBASE_ENABLE | X2APIC_ENABLE and new_mode == APICBASE_ENABLE:
            return 1
        if not old_mode and new_mode == APICBASE_ENABLE | X2APIC_ENABLE:
            return 1
    old = vcpu.apic_base
    vcpu.apic_base = data
    if (old ^ data) & APICBASE_ENABLE:
        kvm_update_cpuid_runtime(vcpu)
    apic_base_changed(vcpu, old)
    return 0


def _set_tsc(vcpu: Vcpu, data: int, host: bool) -> int:
    """The model's time stands still, so the TSC is what was written; TSC_ADJUST follows a guest's write."""
    if not host:
        delta = data - vcpu.msrs.get(mi.MSR_IA32_TSC, 0)
        adjust = vcpu.msrs.get(mi.MSR_IA32_TSC_ADJUST, 0)
        vcpu.msrs[mi.MSR_IA32_TSC_ADJUST] = adjust + delta & _MASK64
    vcpu.msrs[mi.MSR_IA32_TSC] = data
    return 0


def _set_tsc_deadline(vcpu: Vcpu, data: int, host: bool) -> int:  # noqa: ARG001 - as above
    kvm_set_lapic_tscdeadline_msr(vcpu, data)
    return 0


def _set_tsc_adjust(vcpu: Vcpu, data: int, host: bool) -> int:
    """Without the CPUID feature the write is ignored."""
    if vcpu.cpuid.has("tsc_adjust"):
        if not host:
            delta = data - vcpu.msrs.get(mi.MSR_IA32_TSC_ADJUST, 0)
            vcpu.msrs[mi.MSR_IA32_TSC] = vcpu.msrs.get(mi.MSR_IA32_TSC, 0) + delta & _MASK64
            vcpu.make_request(KVM_REQ_CLOCK_UPDATE)
        vcpu.msrs[mi.MSR_IA32_TSC_ADJUST] = data
    return 0


def _set_misc_enable(vcpu: Vcpu, data: int, host: bool) -> int:
    old = vcpu.msrs.get(mi.MSR_IA32_MISC_ENABLE, _STORED[mi.MSR_IA32_MISC_ENABLE])
    if not host:
        if (old ^ data) & MSR_IA32_MISC_ENABLE_PMU_RO_MASK:
            return 1
        data = data & ~MSR_IA32_MISC_ENABLE_EMON | old & MSR_IA32_MISC_ENABLE_EMON
    mwait_changes = bool((old ^ data) & MSR_IA32_MISC_ENABLE_MWAIT)
    follow = mwait_changes and not vcpu.options.has_quirk("misc_enable_no_mwait")
    if follow and not vcpu.cpuid.has("xmm3"):
        return 1
    vcpu.msrs[mi.MSR_IA32_MISC_ENABLE] = data
    if follow:
        kvm_update_cpuid_runtime(vcpu)
    return 0


def _set_xss(vcpu: Vcpu, data: int, host: bool) -> int:
    """No supervisor state component is supported, so only 0 is valid."""
    if data or (not host and not vcpu.cpuid.has("xsaves")):
        return 1
    vcpu.msrs[mi.MSR_IA32_XSS] = data
    return 0


def _set_platform_info(vcpu: Vcpu, data: int, host: bool) -> int:
    if not host or (not data & MSR_PLATFORM_INFO_CPUID_FAULT and cpuid_fault_enabled(vcpu)):
        return 1
    vcpu.msrs[mi.MSR_PLATFORM_INFO] = data
    return 0


def _set_misc_features_enables(vcpu: Vcpu, data: int, host: bool) -> int:  # noqa: ARG001 - as above
    if data & ~MSR_MISC_FEATURES_ENABLES_CPUID_FAULT or (data and not supports_cpuid_fault(vcpu)):
        return 1
    vcpu.msrs[mi.MSR_MISC_FEATURES_ENABLES] = data
    return 0


def _host_only(index: int) -> Callable[[Vcpu, int, bool], int]:
    """An MSR that only userspace may write."""

    def write(vcpu: Vcpu, data: int, host: bool) -> int:
        if not host:
            return 1
        vcpu.msrs[index] = data
        return 0

    return write


def _set_smbase(vcpu: Vcpu, data: int, host: bool) -> int:
    if host:
        vcpu.smbase = data
    return int(not host)


def _set_ucode_rev(vcpu: Vcpu, data: int, host: bool) -> int:
    """The guest's writes are ignored."""
    if host:
        vcpu.msrs[mi.MSR_IA32_UCODE_REV] = data
    return 0


_WRITERS: Final[dict[int, Callable[[Vcpu, int, bool], int]]] = {
    mi.MSR_EFER: _set_efer,
    mi.MSR_K7_HWCR: _set_hwcr,
    mi.MSR_FAM10H_MMIO_CONF_BASE: _set_mmio_conf_base,
    mi.MSR_IA32_CR_PAT: _set_pat,
    mi.MSR_IA32_APICBASE: _set_apic_base,
    mi.MSR_IA32_TSC: _set_tsc,
    mi.MSR_IA32_TSC_ADJUST: _set_tsc_adjust,
    mi.MSR_IA32_TSC_DEADLINE: _set_tsc_deadline,
    mi.MSR_IA32_MISC_ENABLE: _set_misc_enable,
    mi.MSR_IA32_XSS: _set_xss,
    mi.MSR_PLATFORM_INFO: _set_platform_info,
    mi.MSR_MISC_FEATURES_ENABLES: _set_misc_features_enables,
    mi.MSR_IA32_SMBASE: _set_smbase,
    mi.MSR_IA32_ARCH_CAPABILITIES: _host_only(mi.MSR_IA32_ARCH_CAPABILITIES),
    mi.MSR_IA32_UCODE_REV: _set_ucode_rev,
}


def supports_cpuid_fault(vcpu: Vcpu) -> bool:
    """The guest may make CPUID fault above CPL 0."""
    value = vcpu.msrs.get(mi.MSR_PLATFORM_INFO, MSR_PLATFORM_INFO_CPUID_FAULT)
    return bool(value & MSR_PLATFORM_INFO_CPUID_FAULT)


def cpuid_fault_enabled(vcpu: Vcpu) -> bool:
    """CPUID faults above CPL 0."""
    return bool(vcpu.msrs.get(mi.MSR_MISC_FEATURES_ENABLES, 0) & MSR_MISC_FEATURES_ENABLES_CPUID_FAULT)
