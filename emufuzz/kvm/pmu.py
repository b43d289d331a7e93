"""RDPMC on the virtual PMU: which counters exist and who may read them.

KVM: kvm_pmu_rdpmc, intel_rdpmc_ecx_to_pmc, is_vmware_backdoor_pmc. SDM Vol. 2B RDPMC.
Counters do not count: each reads as PMC_VALUE plus its index.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.kvm.msr_index import MSR_IA32_TSC
from emufuzz.kvm.regs import is_protmode, kvm_read_cr4_bits
from emufuzz.kvm.segments import vmx_get_cpl
from emufuzz.kvm.vcpu import Vcpu

PMC_VALUE: Final = 0x123400000000

_GENERAL_COUNTERS: Final = 4
_FIXED_COUNTERS: Final = 3
_TYPE_MASK: Final = 0xFFFF0000
_INDEX_MASK: Final = 0xFFFF
_TYPE_GENERAL: Final = 0
_TYPE_FIXED: Final = 1 << 30
#: Host TSC, real time and apparent time; KVM offers them with the knob off as well.
_VMWARE_BACKDOOR: Final = range(0x10000, 0x10003)


def kvm_pmu_rdpmc(vcpu: Vcpu, index: int) -> tuple[int, int]:
    """(0, value) of counter ECX = `index`, or (1, 0) for #GP: no PMU, no such counter, no right."""
    if not vcpu.options.enable_pmu:
        return 1, 0
    if index in _VMWARE_BACKDOOR:
        return 0, vcpu.msrs.get(MSR_IA32_TSC, 0)
    if not _exists(index):
        return 1, 0
    if not kvm_read_cr4_bits(vcpu, crs.X86_CR4_PCE) and vmx_get_cpl(vcpu) and is_protmode(vcpu):
        return 1, 0
    return 0, PMC_VALUE + index


def _exists(index: int) -> bool:
    kind, number = index & _TYPE_MASK, index & _INDEX_MASK
    if kind == _TYPE_FIXED:
        return number < _FIXED_COUNTERS
    return kind == _TYPE_GENERAL and number < _GENERAL_COUNTERS
