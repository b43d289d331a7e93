"""Memory-type range registers: stored and checked, without effect (KVM: mtrr.c).

SDM Vol. 3A 11.11 "Memory Type Range Registers (MTRRs)".
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import msr_index as mi
from emufuzz.kvm.vcpu import Vcpu

_FIXED: Final = (
    mi.MSR_MTRRfix64K_00000,
    mi.MSR_MTRRfix16K_80000,
    mi.MSR_MTRRfix16K_A0000,
    *range(mi.MSR_MTRRfix4K_C0000, mi.MSR_MTRRfix4K_F8000 + 1),
)
_STORED: Final = frozenset(
    {mi.MSR_MTRRdefType, *_FIXED, *range(mi.MSR_MTRRphysBase0, mi.MSR_MTRRphysMask_LAST + 1)}
)
#: MTRRcap: write combining, fixed ranges, eight variable ranges.
_MTRRCAP: Final = 0x500 | mi.KVM_NR_VAR_MTRR
_VALID_TYPES: Final = frozenset({0, 1, 4, 5, 6})
_DEF_TYPE_KNOWN: Final = 0xCFF


def is_mtrr(index: int) -> bool:
    """An MSR that belongs here, existing or not."""
    in_range = mi.MSR_MTRRphysBase0 <= index <= mi.MSR_MTRRfix4K_F8000
    return in_range or index in (mi.MSR_MTRRcap, mi.MSR_MTRRdefType)


def _valid(vcpu: Vcpu, index: int, data: int) -> bool:
    if index == mi.MSR_MTRRdefType:
        return not data & ~_DEF_TYPE_KNOWN and data & 0xFF in _VALID_TYPES
    if index in _FIXED:
        return all(data >> shift & 0xFF in _VALID_TYPES for shift in range(0, 64, 8))
    reserved = vcpu.cpuid.reserved_gpa_bits
    if index & 1:
        return not data & (reserved | 0x7FF)
    return data & 0xFF in _VALID_TYPES and not data & (reserved | 0xF00)


def kvm_mtrr_set_msr(vcpu: Vcpu, index: int, data: int) -> int:
    """0, or 1 for #GP: no such MTRR, a reserved bit or memory type."""
    if index not in _STORED or not _valid(vcpu, index, data):
        return 1
    vcpu.msrs[index] = data
    return 0


def kvm_mtrr_get_msr(vcpu: Vcpu, index: int) -> tuple[int, int]:
    """(0, value), or (1, 0) where there is no such MTRR."""
    if index == mi.MSR_MTRRcap:
        return 0, _MTRRCAP
    return (0, vcpu.msrs.get(index, 0)) if index in _STORED else (1, 0)
