"""Machine-check banks: stored and checked, without effect (KVM: get_msr_mce, set_msr_mce).

SDM Vol. 3B 15.3 "Machine-Check MSRs".
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import msr_index as mi
from emufuzz.kvm.vcpu import Vcpu

_MCG_CTL_P: Final = 1 << 8
_BANKS: Final = 10  # as most userspaces set up
MCG_CAP: Final = _BANKS | _MCG_CTL_P

_MASK64: Final = (1 << 64) - 1
_MAX_BANKS: Final = 32
_HWCR_MCSTATUS_WR_EN: Final = 1 << 18
_MC_BANK_MSRS: Final = range(mi.MSR_IA32_MC0_CTL, mi.MSR_IA32_MC0_CTL + 4 * _MAX_BANKS)
_MC_CTL2_MSRS: Final = range(mi.MSR_IA32_MC0_CTL2, mi.MSR_IA32_MC0_CTL2 + _MAX_BANKS)


def is_mce(index: int) -> bool:
    """An MSR that belongs here, existing or not."""
    return index == mi.MSR_IA32_MCG_CTL or index in _MC_BANK_MSRS or index in _MC_CTL2_MSRS


def get_msr_mce(vcpu: Vcpu, index: int) -> tuple[int, int]:
    """KVM: get_msr_mce; only the banks that MCG_CAP counts exist, without corrected-error interrupts."""
    if index in _MC_CTL2_MSRS:
        return 1, 0
    if index != mi.MSR_IA32_MCG_CTL and index - mi.MSR_IA32_MC0_CTL >= 4 * _BANKS:
        return 1, 0
    return 0, vcpu.msrs.get(index, _MASK64 if _is_mci_ctl(index) else 0)


def _is_mci_ctl(index: int) -> bool:
    return index in _MC_BANK_MSRS and index % 4 == 0


def set_msr_mce(vcpu: Vcpu, index: int, data: int, *, host: bool) -> int:
    """KVM: set_msr_mce; control registers take 0 or all ones, status registers only 0."""
    if index in _MC_CTL2_MSRS:
        return 1
    if index == mi.MSR_IA32_MCG_CTL:
        if data not in (0, _MASK64):
            return 1
    elif index - mi.MSR_IA32_MC0_CTL >= 4 * _BANKS:
        return 1
    elif _is_mci_ctl(index):
        if data and data | 1 << 10 | 1 != _MASK64:
            return 1
    elif index % 4 == 1 and data and not host:
        writable = vcpu.cpuid.amd_compatible and vcpu.msrs.get(mi.MSR_K7_HWCR, 0) & _HWCR_MCSTATUS_WR_EN
        if not writable:
            return 1
    vcpu.msrs[index] = data
    return 0
