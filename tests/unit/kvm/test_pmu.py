"""RDPMC: which counters exist, and for whom."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.arch.cr import X86_CR4_PAE, X86_CR4_PCE
from emufuzz.kvm.pmu import PMC_VALUE, kvm_pmu_rdpmc

PMU = {"enable_pmu": 1}


@pytest.mark.parametrize(
    ("index", "exists"),
    [(0, True), (3, True), (4, False), (1 << 30, True), (1 << 30 | 2, True), (1 << 30 | 3, False),
     (1 << 31, False), (1 << 29, False)],
)  # fmt: skip
def test_counters(index, exists):
    expected = (0, PMC_VALUE + index) if exists else (1, 0)
    assert kvm_pmu_rdpmc(make_vcpu(knobs=PMU), index) == expected
    assert kvm_pmu_rdpmc(make_vcpu(), index) == (1, 0)


@pytest.mark.parametrize(
    ("mode", "cpl", "cr4", "allowed"),
    [("prot64", 0, X86_CR4_PAE, True), ("prot64", 3, X86_CR4_PAE, False),
     ("prot64", 3, X86_CR4_PAE | X86_CR4_PCE, True), ("real", 0, 0, True)],
)  # fmt: skip
def test_privilege(mode, cpl, cr4, allowed):
    assert kvm_pmu_rdpmc(make_vcpu(mode, cpl, knobs=PMU, cr4=cr4), 0)[0] == (not allowed)


def test_vmware_counters_are_open_to_everybody():
    vcpu = make_vcpu(cpl=3, knobs=PMU, msr=((0x10, 0x777),))
    assert [kvm_pmu_rdpmc(vcpu, index) for index in (0x10000, 0x10002)] == [(0, 0x777)] * 2
    assert kvm_pmu_rdpmc(vcpu, 0x10003) == (1, 0)
