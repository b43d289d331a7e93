"""MMIO SPTEs and the vCPU's MMIO cache."""

from __future__ import annotations

import pytest
from support.mmu import make_mmu, shadow_access
from support.page_tables import ADDR, ALL, TARGET, Chain, W

from emufuzz.arch.cr import X86_CR0_PG, X86_CR0_WP
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS, GuestMemory
from emufuzz.kvm.mmu.hardware import shadow_exit
from emufuzz.kvm.mmu.mmio import MmioCache, check_mmio_spte, vcpu_is_mmio_gpa, vcpu_mmio_gva_to_gpa
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault
from emufuzz.kvm.mmu.pferr import (
    ACC_ALL,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    EMULTYPE_PF,
    INVALID_GPA,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
)
from emufuzz.kvm.mmu.spte import ept_masks, get_mmio_spte_generation, shadow_masks

GPA = TARGET << 12 | ADDR & 0xFFF


@pytest.mark.parametrize("masks", [ept_masks(46), shadow_masks(46)], ids=["ept", "shadow"])
@pytest.mark.parametrize("generation", [0, 1, 0xFF, 0x100, 0x7FFFF, 0x12345678])
@pytest.mark.parametrize("gfn", [0, 0xFEE00, (1 << 34) - 1])
def test_an_mmio_spte_holds_frame_rights_and_19_bits_of_generation(masks, generation, gfn):
    spte = masks.make_mmio_spte(generation, gfn, ACC_ALL)
    assert masks.is_mmio_spte(spte)
    assert not spte >> 11 & 1  # which would say "memory"
    assert masks.get_mmio_spte_gfn(spte) == gfn
    assert get_mmio_spte_generation(spte) == generation & 0x7FFFF
    assert masks.get_mmio_spte_access(spte) == masks.mmio_access_mask
    assert check_mmio_spte(generation, spte)
    assert not check_mmio_spte(generation + 2, spte)
    assert not check_mmio_spte(generation | KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS, spte)


@pytest.mark.parametrize("masks", [ept_masks(46), shadow_masks(46)], ids=["ept", "shadow"])
def test_memory_is_not_mmio_and_keeps_its_rights(masks):
    for access in range(8):
        spte = masks.make_spte(access, 0x1234, host_writable=True, wrprot=False)
        assert not masks.is_mmio_spte(spte)
        assert masks.access(spte) == access
        assert masks.access(masks.make_spte(access, 1, host_writable=False, wrprot=False)) == access & ~2
        assert masks.access(masks.make_spte(access, 1, host_writable=True, wrprot=True)) == access & ~2


def test_no_reserved_bit_no_mmio_spte():
    masks = shadow_masks(52)
    assert masks.mmio_value == 0
    assert not masks.is_mmio_spte(1 << 51 | 1)
    assert ept_masks(52).mmio_value == 6
    mmu = make_mmu(GuestMemory({}), ept=False, host_maxphyaddr=52)
    assert not mmu.mmio_caching


def test_the_cache_matches_pages_of_its_generation():
    cache = MmioCache()
    cache.store(4, 0x7123, 9, ACC_USER_MASK)
    assert cache.match_gva(4, 0x7FFF)
    assert cache.match_gpa(4, 0x9123)
    assert not cache.match_gva(6, 0x7FFF)
    assert not cache.match_gpa(6, 0x9123)
    assert not cache.match_gva(4, 0x8000)
    cache.clear(0x8000)
    assert cache.match_gva(4, 0x7000)
    cache.clear(0x7FFF)
    assert not cache.match_gva(4, 0x7000)
    assert cache.match_gpa(4, 0x9000)


def test_page_zero_is_never_cached():
    cache = MmioCache()
    cache.store(4, 0x123, 0, 0)
    assert not cache.match_gva(4, 0x123)
    assert not cache.match_gpa(4, 0x123)


def test_nothing_is_cached_while_slots_change():
    cache = MmioCache()
    cache.store(4 | KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS, 0x7000, 7, 0)
    assert (cache.gva, cache.gfn) == (0, 0)


def test_the_apic_page_is_mmio_always():
    mmu = make_mmu(GuestMemory({}))
    assert vcpu_is_mmio_gpa(mmu, 0xFEE000B0)
    assert not vcpu_is_mmio_gpa(mmu, 0xFEE01000)
    assert not vcpu_is_mmio_gpa(mmu, 0x9000)
    mmu.mmio.store(mmu.slots.generation, 0, 9, 0)
    assert vcpu_is_mmio_gpa(mmu, 0x9FFF)


def test_translation_for_the_emulator_walks_then_remembers():
    chain = Chain("4-level")
    mmu = make_mmu(chain.memory, chain.state, ept=False)
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR, None, False) == (0, GPA)
    assert shadow_access(mmu, ADDR, PFERR_WRITE_MASK) == [(RET_PF_EMULATE, EMULTYPE_PF)]
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR, None, True) == (1, GPA)
    chain.slots.write_guest(0x10000, bytes(4096))
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR + 1, None, True) == (1, GPA + 1)
    mmu.invlpg(ADDR)
    exception = X86Exception()
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR, exception, True) == (-1, INVALID_GPA)
    assert (exception.vector, exception.error_code) == (14, PFERR_WRITE_MASK)


def test_the_cached_translation_is_used_only_if_its_rights_allow():
    chain = Chain("4-level", {1: ALL & ~W}, cr0=X86_CR0_WP)
    mmu = make_mmu(chain.memory, chain.state, ept=False)
    shadow_access(mmu, ADDR)
    assert mmu.mmio.access == ACC_USER_MASK
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR, None, False) == (1, GPA)
    exception = X86Exception()
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR, exception, True) == (-1, INVALID_GPA)
    assert exception.error_code == PFERR_WRITE_MASK | PFERR_PRESENT_MASK
    mmu.vcpu.cr0 &= ~X86_CR0_PG
    assert vcpu_mmio_gva_to_gpa(mmu, ADDR, None, True) == (1, GPA)


def test_hardware_finds_reserved_bits_in_the_mmio_spte():
    chain = Chain("4-level")
    mmu = make_mmu(chain.memory, chain.state, ept=False)
    assert shadow_exit(mmu, ADDR, 0) == 0
    shadow_access(mmu, ADDR)
    assert shadow_exit(mmu, ADDR, PFERR_WRITE_MASK) == PFERR_RSVD_MASK | PFERR_PRESENT_MASK | PFERR_WRITE_MASK
    mmu.mmio.clear()
    assert kvm_mmu_page_fault(mmu, ADDR, 9) == (RET_PF_EMULATE, EMULTYPE_PF)
    assert mmu.mmio.access == ACC_WRITE_MASK | ACC_USER_MASK
    assert mmu.stats["pf_taken"] == 1
