"""Canonical addresses and linear-address masking (SDM Vol. 1 3.3.7.1, Vol. 3A 4.4)."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.emulator.x86emul import (
    X86EMUL_F_DT_LOAD,
    X86EMUL_F_FETCH,
    X86EMUL_F_IMPLICIT,
    X86EMUL_F_INVLPG,
    X86EMUL_F_MSR,
    X86EMUL_F_WRITE,
)
from emufuzz.kvm.address import (
    canonical_address,
    is_noncanonical_address,
    kvm_get_active_cr3_lam_bits,
    vmx_get_untagged_addr,
)

PAE, LA57, LAM_SUP = crs.X86_CR4_PAE, crs.X86_CR4_LA57, 1 << 28
U57, U48 = 1 << 61, 1 << 62
LAM = {"cpuid": {"features": {"lam": True, "la57": True}}}


@pytest.mark.parametrize(
    ("addr", "bits", "expected"),
    [
        (0x7FFF_FFFF_FFFF, 48, 0x7FFF_FFFF_FFFF),
        (0x8000_0000_0000, 48, 0xFFFF_8000_0000_0000),
        (0x8000_0000_0000, 57, 0x8000_0000_0000),
        (0xABCD_0000_0000_0001, 48, 1),
        (0x0100_0000_0000_0000, 57, 0xFF00_0000_0000_0000),
    ],
)
def test_sign_extension(addr, bits, expected):
    assert canonical_address(addr, bits) == expected


@pytest.mark.parametrize("flags", [0, X86EMUL_F_WRITE, X86EMUL_F_INVLPG, X86EMUL_F_MSR, X86EMUL_F_DT_LOAD])
@pytest.mark.parametrize("host_la57", [0, 1])
@pytest.mark.parametrize("la57", [0, LA57])
def test_which_width_counts(flags, host_la57, la57):
    vcpu = make_vcpu(knobs={"host_la57": host_la57}, cr4=PAE | la57)
    wide = host_la57 if flags & (X86EMUL_F_INVLPG | X86EMUL_F_MSR | X86EMUL_F_DT_LOAD) else la57
    assert is_noncanonical_address(vcpu, 1 << 50, flags) is not bool(wide)
    assert is_noncanonical_address(vcpu, 1 << 60, flags)
    assert not is_noncanonical_address(vcpu, 0xFFFF_FFFF_FFFF_F000, flags)


@pytest.mark.parametrize(
    ("cr3", "cr4", "addr", "expected"),
    [
        (0, 0, 0x7F12_0000_0000_1000, 0x7F12_0000_0000_1000),
        (U48, 0, 0x7F12_0000_0000_1000, 0x0000_0000_0000_1000),
        (U57, 0, 0x7E12_0000_0000_1000, 0x0012_0000_0000_1000),
        (U48 | U57, 0, 0x7E12_0000_0000_1000, 0x0012_0000_0000_1000),
        (U48, 0, 0x0000_8000_0000_1000, 0x7FFF_8000_0000_1000),
        (U48, 0, 0x8F12_8000_0000_1000, 0x8F12_8000_0000_1000),
        (0, LAM_SUP, 0x8F12_8000_0000_1000, 0xFFFF_8000_0000_1000),
        (0, LAM_SUP, 0x8F12_0000_0000_1000, 0x8000_0000_0000_1000),
        (0, LAM_SUP | LA57, 0x8F12_0000_0000_1000, 0xFF12_0000_0000_1000),
        (0, LAM_SUP, 0x0F12_8000_0000_1000, 0x0F12_8000_0000_1000),
    ],
)
def test_masking(cr3, cr4, addr, expected):
    vcpu = make_vcpu(kvm=LAM, cr3=0x5000 | cr3, cr4=PAE | cr4)
    assert vmx_get_untagged_addr(vcpu, addr, X86EMUL_F_WRITE) == expected
    for flags in (X86EMUL_F_FETCH, X86EMUL_F_IMPLICIT, X86EMUL_F_INVLPG):
        assert vmx_get_untagged_addr(vcpu, addr, flags) == addr


def test_masking_is_a_matter_of_64_bit_code_and_of_cpuid():
    tagged = 0x7F12_0000_0000_1000
    compat = make_vcpu("compat32", kvm=LAM, cr3=0x5000 | U48, cr4=PAE)
    assert vmx_get_untagged_addr(compat, tagged, 0) == tagged
    without = make_vcpu(cr3=0x5000 | U48, cr4=PAE)
    assert kvm_get_active_cr3_lam_bits(without) == 0
    assert vmx_get_untagged_addr(without, tagged, 0) == tagged
