"""The register cache: what is read from the VMCS when, and what goes back at an entry."""

from __future__ import annotations

import pytest
from support.vcpus import Hooks, make_vcpu

from emufuzz.arch import cr as crs
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RSP
from emufuzz.kvm import regs as r
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.paging_state import VcpuPagingState
from emufuzz.kvm.rflags_read import vmx_get_if_flag, vmx_get_rflags
from emufuzz.kvm.state import gpr_of
from emufuzz.kvm.vcpu import (
    VCPU_EXREG_CR0,
    VCPU_EXREG_CR3,
    VCPU_EXREG_PDPTR,
    VCPU_EXREG_RFLAGS,
    VCPU_EXREG_SEGMENTS,
    VCPU_REGS_RIP,
)

PAE_STATE = {"cr4": crs.X86_CR4_PAE, "cr3": 0x5020}
PDPTES = b"".join((n << 12 | 1).to_bytes(8, "little") for n in range(1, 5))


def exited(**kwargs):
    """A vCPU after an entry and an exit: all lazily cached registers are in the VMCS."""
    vcpu = make_vcpu(**kwargs)
    r.vmx_before_entry(vcpu)
    r.vmx_after_exit(vcpu)
    return vcpu


@pytest.mark.parametrize("reg", range(25))
def test_lazy_set(reg):
    lazy = reg in (4, VCPU_REGS_RIP) or reg >= VCPU_EXREG_PDPTR
    assert r.kvm_register_is_available(exited(), reg) is not lazy


@pytest.mark.parametrize(
    ("reg", "field", "read"),
    [(VCPU_REGS_RIP, vf.GUEST_RIP, r.kvm_rip_read), (VCPU_REGS_RSP, vf.GUEST_RSP, r.kvm_rsp_read)],
)
def test_rip_and_rsp_are_read_once_and_stored_at_entry(reg, field, read):
    vcpu = exited()
    vcpu.vmcs.write(field, 0x1234)
    assert read(vcpu) == 0x1234
    vcpu.vmcs.write(field, 0x5678)
    assert read(vcpu) == 0x1234
    assert not r.kvm_register_is_dirty(vcpu, reg)
    r.kvm_register_write_raw(vcpu, reg, (1 << 64) + 0x9ABC)
    assert vcpu.vmcs.read(field) == 0x5678
    r.vmx_before_entry(vcpu)
    assert vcpu.vmcs.read(field) == 0x9ABC
    assert not r.kvm_register_is_dirty(vcpu, reg)


def test_other_gprs_are_always_at_hand():
    vcpu = exited()
    r.kvm_register_write_raw(vcpu, VCPU_REGS_RAX, 0x1_8000_0001)
    r.kvm_register_write_raw(vcpu, 2, 0x2_0000_0003)
    assert r.kvm_read_edx_eax(vcpu) == 0x3_8000_0001
    vcpu.vmcs.write(vf.GUEST_RSP, 0x42)
    assert gpr_of(vcpu)[VCPU_REGS_RSP] == 0x42


def test_guest_owned_bits_come_from_the_vmcs_only():
    vcpu = exited()
    vcpu.vmcs.write(vf.GUEST_CR0, vcpu.vmcs.read(vf.GUEST_CR0) | crs.X86_CR0_TS | crs.X86_CR0_EM)
    assert not r.kvm_read_cr0_bits(vcpu, crs.X86_CR0_EM)
    assert not r.kvm_register_is_available(vcpu, VCPU_EXREG_CR0)
    assert r.kvm_read_cr0_bits(vcpu, crs.X86_CR0_TS)
    assert r.kvm_register_is_available(vcpu, VCPU_EXREG_CR0)
    assert not r.kvm_read_cr0(vcpu) & crs.X86_CR0_EM
    vcpu.vmcs.write(vf.GUEST_CR4, vcpu.vmcs.read(vf.GUEST_CR4) ^ crs.X86_CR4_PGE ^ crs.X86_CR4_VME)
    assert r.kvm_read_cr4_bits(vcpu, crs.X86_CR4_PGE)
    assert not r.kvm_read_cr4(vcpu) & crs.X86_CR4_VME


def test_write_protection_belongs_to_kvm_without_ept():
    vcpu = exited(knobs={"ept": 0})
    vcpu.vmcs.write(vf.GUEST_CR0, vcpu.vmcs.read(vf.GUEST_CR0) & ~crs.X86_CR0_WP)
    assert r.kvm_read_cr0_bits(vcpu, crs.X86_CR0_WP)
    assert vcpu.vmcs.read(vf.CR0_GUEST_HOST_MASK) & crs.X86_CR0_WP
    assert not vcpu.cr4_guest_owned_bits & crs.X86_CR4_PGE


def test_fsgsbase_is_guest_owned_only_with_the_feature():
    with_it = make_vcpu(kvm={"cpuid": {"features": {"fsgsbase": True}}})
    assert with_it.cr4_guest_owned_bits & crs.X86_CR4_FSGSBASE
    assert not make_vcpu().cr4_guest_owned_bits & crs.X86_CR4_FSGSBASE


@pytest.mark.parametrize(("ept", "expected"), [(1, 0xABC000), (0, 0x7000)])
def test_cr3_is_in_the_vmcs_only_while_loads_do_not_exit(ept, expected):
    vcpu = exited(knobs={"ept": ept}, cr3=0x7000)
    vcpu.vmcs.write(vf.GUEST_CR3, 0xABC000)
    assert r.kvm_read_cr3(vcpu) == expected
    assert r.kvm_register_is_available(vcpu, VCPU_EXREG_CR3)


def test_identity_map_stands_in_for_cr3_of_an_unpaged_restricted_guest():
    vcpu = exited(mode="real", knobs={"unrestricted_guest": 0}, cr3=0x7000)
    assert vcpu.vmcs.read(vf.GUEST_CR3) == vcpu.options.ept_identity_map_addr
    assert r.kvm_read_cr3(vcpu) == 0x7000


def test_pdptes():
    vcpu = exited(mode="prot32", hooks=Hooks({0x5020: PDPTES}), **PAE_STATE)
    assert vcpu.vmcs.read(vf.GUEST_PDPTR2) == 0x3001
    vcpu.vmcs.write(vf.GUEST_PDPTR2, 0x9001)
    assert r.kvm_pdptr_read(vcpu, 2) == 0x9001
    state = VcpuPagingState(vcpu)
    assert list(state.pdptrs) == [0x1001, 0x2001, 0x9001, 0x4001]


def test_exit_information_is_read_once():
    vcpu = exited()
    vcpu.vmcs.hw_write(vf.EXIT_QUALIFICATION, 0x11)
    vcpu.vmcs.hw_write(vf.VM_EXIT_INTR_INFO, 0x80000306)
    assert (r.vmx_get_exit_qual(vcpu), r.vmx_get_intr_info(vcpu)) == (0x11, 0x80000306)
    vcpu.vmcs.hw_write(vf.EXIT_QUALIFICATION, 0x22)
    vcpu.vmcs.hw_write(vf.VM_EXIT_INTR_INFO, 0)
    assert (r.vmx_get_exit_qual(vcpu), r.vmx_get_intr_info(vcpu)) == (0x11, 0x80000306)


def test_rflags_are_read_lazily_and_written_at_once():
    vcpu = exited()
    vcpu.vmcs.write(vf.GUEST_RFLAGS, 0x202)
    assert vmx_get_rflags(vcpu) == 0x202
    assert vmx_get_if_flag(vcpu)
    assert r.kvm_register_is_available(vcpu, VCPU_EXREG_RFLAGS)
    assert not r.kvm_register_is_available(vcpu, VCPU_EXREG_SEGMENTS)


def test_a_register_outside_the_cache_is_an_error():
    with pytest.raises(ValueError, match="not cached"):
        r.vmx_cache_reg(make_vcpu(), VCPU_EXREG_SEGMENTS)


@pytest.mark.parametrize(
    ("mode", "protected", "paging", "long"),
    [("real", False, False, False), ("prot32", True, True, False), ("compat16", True, True, True)],
)
def test_mode_predicates(mode, protected, paging, long):
    vcpu = exited(mode=mode)
    assert (r.is_protmode(vcpu), r.is_paging(vcpu), r.is_long_mode(vcpu)) == (protected, paging, long)
    assert r.is_pae(vcpu) is long
    assert not r.is_pae_paging(vcpu)


def test_paging_state_is_the_vcpus():
    vcpu = exited(cpl=3, kvm={"pkru": 5, "cpuid": {"maxphyaddr": 46}}, rflags=1 << 18)
    state = VcpuPagingState(vcpu)
    assert (state.cr0, state.cr3, state.cr4) == (
        r.kvm_read_cr0(vcpu), r.kvm_read_cr3(vcpu), r.kvm_read_cr4(vcpu),
    )  # fmt: skip
    assert (state.cpl(), state.pkru, state.maxphyaddr, state.efer) == (3, 5, 46, vcpu.efer)
    assert state.rflags == 1 << 18 | 2
    assert state.has_gbpages
    assert not state.amd_compatible
