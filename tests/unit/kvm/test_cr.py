"""Control registers: refused values (SDM Vol. 3A 2.5), and what hardware gets."""

from __future__ import annotations

import pytest
from support.vcpus import Hooks, make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.cr import (
    kvm_get_cr8,
    kvm_lmsw,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    kvm_set_cr8,
)
from emufuzz.kvm.regs import kvm_read_cr0, kvm_read_cr3, kvm_read_cr4
from emufuzz.kvm.vmx_bits import (
    CPU_BASED_CR3_LOAD_EXITING,
    SECONDARY_EXEC_DESC,
    VM_ENTRY_IA32E_MODE,
)
from emufuzz.kvm.xcr import kvm_set_xcr

PE, ET, NE, WP, TS = crs.X86_CR0_PE, crs.X86_CR0_ET, crs.X86_CR0_NE, crs.X86_CR0_WP, crs.X86_CR0_TS
NW, CD, PG = crs.X86_CR0_NW, crs.X86_CR0_CD, crs.X86_CR0_PG
PAE, PCIDE, LA57, SMEP, PGE = (
    crs.X86_CR4_PAE, crs.X86_CR4_PCIDE, crs.X86_CR4_LA57, crs.X86_CR4_SMEP, crs.X86_CR4_PGE,
)  # fmt: skip
TR = 6
PDPTES = b"".join((n << 12 | 1).to_bytes(8, "little") for n in range(1, 5))
FEATURES = {
    "cpuid": {"features": dict.fromkeys(("pcid", "la57", "smep", "umip", "xsave", "lam", "vmx"), True)}
}


@pytest.mark.parametrize(
    ("mode", "state", "cr0", "result"),
    [
        ("prot32", {}, PE | ET | PG | 1 << 32, 1),
        ("prot32", {}, PE | PG | NW, 1),
        ("prot32", {}, PE | PG | NW | CD, 0),
        ("prot32", {}, PG, 1),
        ("prot32", {}, PE, 0),
        ("prot32", {}, PE | PG | 1 << 6 | 1 << 17, 0),  # reserved bits below 32 are ignored
        ("real", {"efer": crs.EFER_LME}, PE | PG, 1),  # LME without PAE
        ("real", {"efer": crs.EFER_LME, "cr4": PAE}, PE | PG, 0),
        ("prot64", {}, PE, 1),  # PG off in 64-bit code
        ("compat32", {}, PE, 0),
        ("compat32", {"cr4": PAE | PCIDE}, PE, 1),
        ("prot32", {"cr4": PAE, "cr0": PE}, PE | PG, 1),  # PDPTEs cannot be read
    ],
)
def test_cr0(mode, state, cr0, result):
    vcpu = make_vcpu(mode, kvm=FEATURES, **state)
    before = kvm_read_cr0(vcpu)
    assert kvm_set_cr0(vcpu, cr0) == result
    known = 0xE005003F
    assert kvm_read_cr0(vcpu) == (before if result else cr0 & known | ET)


def test_cr0_that_would_enable_long_mode_from_a_64_bit_code_segment():
    cs = make_vcpu("prot64").vmcs.read(vf.GUEST_CS_AR_BYTES)
    vcpu = make_vcpu("prot32", efer=crs.EFER_LME, cr4=PAE, cr0=PE | ET)
    vcpu.vmcs.write(vf.GUEST_CS_AR_BYTES, cs)
    vcpu.segment_cache_bitmask = 0
    assert kvm_set_cr0(vcpu, PE | PG) == 1


def test_long_mode_is_entered_and_left_with_paging():
    vcpu = make_vcpu("prot32", efer=crs.EFER_LME, cr4=PAE, cr0=PE | ET)
    vcpu.vmcs.write(vf.GUEST_TR_AR_BYTES, 0x83)
    assert not kvm_set_cr0(vcpu, PE | PG)
    assert vcpu.efer == crs.EFER_LME | crs.EFER_LMA
    assert vcpu.vmcs.read(vf.VM_ENTRY_CONTROLS) & VM_ENTRY_IA32E_MODE
    assert vcpu.vmcs.read(vf.GUEST_TR_AR_BYTES) == 0x8B
    assert not kvm_set_cr0(vcpu, PE)
    assert vcpu.efer == crs.EFER_LME
    assert not vcpu.vmcs.read(vf.VM_ENTRY_CONTROLS) & VM_ENTRY_IA32E_MODE
    assert "TLB_FLUSH_GUEST" in vcpu.requests


@pytest.mark.parametrize(
    ("knobs", "always"),
    [({}, NE), ({"unrestricted_guest": 0}, NE | PE | PG), ({"ept": 0}, NE | PE | PG | WP)],
)
def test_hardware_cr0(knobs, always):
    vcpu = make_vcpu("real", knobs=knobs)
    assert not kvm_set_cr0(vcpu, TS | CD | NW)
    assert vcpu.vmcs.read(vf.CR0_READ_SHADOW) == TS | CD | NW | ET
    assert vcpu.vmcs.read(vf.GUEST_CR0) == TS | ET | always


def test_write_protect_toggles_only_reset_the_mmu_when_paging():
    hooks = Hooks()
    vcpu = make_vcpu("prot32", hooks=hooks)
    hooks.calls.clear()
    kvm_set_cr0(vcpu, kvm_read_cr0(vcpu) ^ WP)
    assert hooks.calls["mmu_reset_context"] == 1
    unpaged = make_vcpu("prot32", hooks=hooks, cr0=PE | ET)
    hooks.calls.clear()
    kvm_set_cr0(unpaged, PE | WP)
    assert not hooks.calls["mmu_reset_context"]


@pytest.mark.parametrize(("msw", "expected"), [(0xFFFF, 0xF), (0, 1), (0xE, 0xF), (1, 1)])
def test_lmsw_sets_but_never_clears_pe(msw, expected):
    vcpu = make_vcpu("prot32")
    kvm_lmsw(vcpu, msw)
    assert kvm_read_cr0(vcpu) & 0xF == expected


@pytest.mark.parametrize(
    ("mode", "cr4", "cr3", "result", "stored"),
    [
        ("prot64", PAE, 0x7018, 0, 0x7018),
        ("prot64", PAE, 1 << 63, 1, None),
        ("prot64", PAE | PCIDE, 1 << 63 | 0x7001, 0, 0x7001),
        ("prot64", PAE, 1 << 52, 1, None),
        ("prot64", PAE, 1 << 62, 0, 1 << 62),  # LAM_U48
        ("prot32", PAE, 0x5020, 0, 0x5020),
        ("prot32", PAE, 0x6000, 1, None),  # no PDPTEs there
    ],
)
def test_cr3(mode, cr4, cr3, result, stored):
    hooks = Hooks({0x5020: PDPTES})
    vcpu = make_vcpu(mode, kvm=FEATURES, cr4=cr4, cr3=0x5020, hooks=hooks)
    hooks.calls.clear()
    assert kvm_set_cr3(vcpu, cr3) == result
    assert kvm_read_cr3(vcpu) == (0x5020 if stored is None else stored)
    assert hooks.calls["invalidate_pcid"] == int(not result and not cr3 >> 63)


def test_a_pdpte_with_a_reserved_bit_is_refused():
    bad = (0x1001 | 1 << 5).to_bytes(8, "little") + PDPTES[8:]
    hooks = Hooks({0x5020: PDPTES, 0x6000: bad, 0x7000: (1 << 5).to_bytes(8, "little")})
    vcpu = make_vcpu("prot32", cr4=PAE, cr3=0x5020, hooks=hooks)
    assert kvm_set_cr3(vcpu, 0x6000) == 1
    assert vcpu.pdptrs == [0x1001, 0x2001, 0x3001, 0x4001]
    assert kvm_set_cr3(vcpu, 0x7000) == 0  # not present: its other bits do not matter
    assert vcpu.pdptrs == [0x20, 0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "state", "cr4", "result"),
    [
        ("prot32", {}, 1 << 14, 1),
        ("prot32", {}, 1 << 28, 0),  # LAM_SUP
        ("prot32", {}, crs.X86_CR4_SMAP, 1),  # not in CPUID
        ("prot64", {}, 0, 1),  # PAE cleared
        ("prot64", {}, PAE | LA57, 1),
        ("prot32", {}, LA57, 0),
        ("prot64", {}, PAE | PCIDE, 0),
        ("prot64", {"cr3": 0x5001}, PAE | PCIDE, 1),
        ("prot64", {"cr3": 0x5001, "cr4": PAE | PCIDE}, PAE | PCIDE | SMEP, 0),
        ("prot32", {}, PCIDE, 1),
        ("prot32", {}, PAE, 1),  # PDPTEs cannot be read
        ("real", {}, PAE, 0),
    ],
)
def test_cr4(mode, state, cr4, result):
    vcpu = make_vcpu(mode, kvm=FEATURES, **state)
    before = kvm_read_cr4(vcpu)
    assert kvm_set_cr4(vcpu, cr4) == result
    assert kvm_read_cr4(vcpu) == (before if result else cr4)


def test_vmxe_is_refused_in_smm():
    assert kvm_set_cr4(make_vcpu("prot32", kvm=FEATURES), 1 << 13) == 0
    assert kvm_set_cr4(make_vcpu("prot32", kvm={**FEATURES, "smm": True}), 1 << 13) == 1


@pytest.mark.parametrize(
    ("before", "after", "request_name"),
    [
        (PAE, PAE | PGE, "TLB_FLUSH_GUEST"),
        (PAE | PCIDE, PAE, "TLB_FLUSH_GUEST"),
        (PAE, PAE | SMEP, "TLB_FLUSH_CURRENT"),
        (PAE | SMEP, PAE, None),
        (PAE, PAE | PCIDE, None),
    ],
)
def test_tlb_flushes(before, after, request_name):
    vcpu = make_vcpu("prot64", kvm=FEATURES, cr4=before)
    assert not kvm_set_cr4(vcpu, after)
    assert vcpu.requests == ({request_name} if request_name else set())


@pytest.mark.parametrize(
    ("mode", "knobs", "cr4", "hardware"),
    [
        ("real", {}, SMEP, SMEP | 0x2040),
        ("real", {"unrestricted_guest": 0}, SMEP, 0x2040 | crs.X86_CR4_VME | crs.X86_CR4_PSE),
        ("prot32", {"unrestricted_guest": 0}, SMEP, 0x2040 | SMEP),
        ("prot32", {"ept": 0}, SMEP, 0x2040 | SMEP | PAE),
    ],
)
def test_hardware_cr4(mode, knobs, cr4, hardware):
    vcpu = make_vcpu(mode, knobs=knobs, kvm=FEATURES)
    assert not kvm_set_cr4(vcpu, cr4)
    assert vcpu.vmcs.read(vf.CR4_READ_SHADOW) == cr4
    assert vcpu.vmcs.read(vf.GUEST_CR4) == hardware


def test_umip_emulation_switches_descriptor_table_exits():
    vcpu = make_vcpu("prot32", knobs={"host_umip": 0}, kvm=FEATURES)
    kvm_set_cr4(vcpu, crs.X86_CR4_UMIP)
    assert vcpu.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) & SECONDARY_EXEC_DESC
    assert not vcpu.vmcs.read(vf.GUEST_CR4) & crs.X86_CR4_UMIP
    assert kvm_read_cr4(vcpu) == crs.X86_CR4_UMIP
    kvm_set_cr4(vcpu, 0)
    assert not vcpu.vmcs.read(vf.SECONDARY_VM_EXEC_CONTROL) & SECONDARY_EXEC_DESC


def test_osxsave_shows_in_cpuid():
    vcpu = make_vcpu("prot32", kvm=FEATURES)
    kvm_set_cr4(vcpu, crs.X86_CR4_OSXSAVE)
    assert vcpu.cpuid.has("osxsave")
    kvm_set_cr4(vcpu, 0)
    assert not vcpu.cpuid.has("osxsave")


def test_cr3_accesses_exit_while_a_restricted_guest_does_not_page():
    vcpu = make_vcpu("prot32", knobs={"unrestricted_guest": 0}, cr3=0x7000)
    assert not vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_CR3_LOAD_EXITING
    kvm_set_cr0(vcpu, PE)
    assert vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_CR3_LOAD_EXITING
    kvm_set_cr0(vcpu, PE | PG)
    assert not vcpu.vmcs.read(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_CR3_LOAD_EXITING
    assert kvm_read_cr3(vcpu) == 0x7000


@pytest.mark.parametrize(("cr8", "result"), [(15, 0), (16, 1), (1 << 63, 1)])
def test_cr8(cr8, result):
    vcpu = make_vcpu(cr8=3)
    assert kvm_set_cr8(vcpu, cr8) == result
    assert kvm_get_cr8(vcpu) == (3 if result else cr8)


@pytest.mark.parametrize(
    ("index", "xcr0", "result"),
    [(0, 1, 0), (0, 7, 0), (0, 3, 0), (1, 1, 1), (0, 0, 1), (0, 2, 1), (0, 5, 1), (0, 9, 1), (0, 0x27, 1),
     (0, 1 << 17 | 3, 1), (0, 1 << 63 | 1, 1)],
)  # fmt: skip
def test_xcr0(index, xcr0, result):
    vcpu = make_vcpu(kvm=FEATURES)
    assert kvm_set_xcr(vcpu, index, xcr0) == result
    assert vcpu.xcr0 == (3 if result else xcr0)


@pytest.mark.parametrize(
    ("xcr0", "result"), [(0x1F, 0), (0xF, 1), (0xE7, 0), (0xE3, 1), (0x67, 1), (0x60003, 0), (0x20003, 1)]
)
def test_xcr0_components_that_go_together(xcr0, result):
    leaf = {"function": 0xD, "eax": 0x600FF}
    assert kvm_set_xcr(make_vcpu(kvm={"cpuid": {"leaves": [leaf]}}), 0, xcr0) == result
