"""Page faults with EPT: memory, holes, read-only slots, write tracking, dirty logging, the APIC page."""

from __future__ import annotations

import pytest
from support.mmu import ept_access, make_mmu
from support.page_tables import ADDR, ROOT, TARGET, Chain

from emufuzz.kvm.memslots import (
    APIC_ACCESS_PAGE_PRIVATE_MEMSLOT,
    KVM_MEM_LOG_DIRTY_PAGES,
    KVM_MEM_READONLY,
    GuestMemory,
)
from emufuzz.kvm.mmu.hardware import (
    EXIT_REASON_EPT_MISCONFIG,
    EXIT_REASON_EPT_VIOLATION,
    ept_exit,
    ept_guest_access,
)
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault, kvm_mmu_write_protect_fault
from emufuzz.kvm.mmu.paging import guest_paging
from emufuzz.kvm.mmu.pferr import (
    ACC_ALL,
    EMULTYPE_ALLOW_RETRY_PF,
    EMULTYPE_PF,
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT_WRITABLE_MASK,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from emufuzz.kvm.mmu.shadow_page import ShadowRole
from emufuzz.kvm.mmu.tdp import ept_violation_error_code

RAM, ROM, HOLE = 0x1000, 0x2000, 0x9000
READ, WRITE, FETCH = 0, PFERR_WRITE_MASK, PFERR_FETCH_MASK


def _mmu(**knobs):
    memory = GuestMemory({})
    memory.set_memory_region(0, 1, 1)
    memory.set_memory_region(1, 2, 1, KVM_MEM_READONLY)
    return make_mmu(memory, **knobs)


def _results(mmu, gpa, access=READ):
    return [result.result for result in ept_access(mmu, gpa, access)]


@pytest.mark.parametrize("access", [READ, WRITE, FETCH])
def test_memory_faults_once(access):
    mmu = _mmu()
    assert _results(mmu, RAM, access) == [RET_PF_FIXED]
    for again in (READ, WRITE, FETCH):
        assert _results(mmu, RAM + 0xFFF, again) == []
    assert mmu.stats["pf_fixed"] == mmu.stats["pf_taken"] == 1


def test_a_hole_is_emulated_by_violation_then_by_misconfiguration():
    mmu = _mmu()
    assert ept_exit(mmu, HOLE, WRITE) == (EXIT_REASON_EPT_VIOLATION, 2 | 1 << 7)
    assert ept_access(mmu, HOLE, WRITE) == [(RET_PF_EMULATE, EMULTYPE_PF)]
    assert ept_exit(mmu, HOLE, READ) == (EXIT_REASON_EPT_MISCONFIG, 0)
    assert ept_access(mmu, HOLE) == [(RET_PF_EMULATE, EMULTYPE_PF)]
    assert mmu.stats["pf_mmio_spte_created"] == mmu.stats["pf_taken"] == 1


def test_a_misconfiguration_needs_no_mmio_cache():
    mmu = _mmu()
    _results(mmu, HOLE)
    mmu.mmio.gen = mmu.mmio.gfn = 0
    assert _results(mmu, HOLE) == [RET_PF_EMULATE]
    assert (mmu.mmio.gfn, mmu.mmio.gva) == (HOLE >> 12, 0)


def test_an_old_generation_sends_the_fault_the_slow_way():
    mmu = _mmu()
    _results(mmu, HOLE)
    mmu.memory.set_memory_region(7, 0x100, 1)
    assert _results(mmu, HOLE) == [RET_PF_EMULATE]
    assert mmu.stats["pf_mmio_spte_created"] == 2
    mmu.memory.set_memory_region(8, HOLE >> 12, 1)
    assert _results(mmu, HOLE) == [RET_PF_FIXED]


def test_a_misconfiguration_on_nothing_is_retried():
    assert kvm_mmu_page_fault(_mmu(), HOLE, PFERR_RSVD_MASK).result == RET_PF_RETRY


def test_generation_wrap_zaps_all():
    mmu = _mmu()
    _results(mmu, HOLE)
    mmu.memory.spaces[0].generation = (1 << 19) - 2
    mmu.memory.set_memory_region(7, 0x100, 1)
    assert mmu.direct_maps == {}


def test_without_mmio_caching_every_access_is_a_violation():
    mmu = _mmu(mmio_caching=False)
    for _ in range(2):
        assert ept_exit(mmu, HOLE, READ)[0] == EXIT_REASON_EPT_VIOLATION
        assert _results(mmu, HOLE) == [RET_PF_EMULATE]
    assert mmu.direct_map == {}


def test_frames_beyond_the_host_get_no_entry():
    mmu = _mmu(host_maxphyaddr=36)
    assert _results(mmu, 1 << 36) == [RET_PF_EMULATE]
    assert mmu.direct_map == {}
    assert _results(mmu, (1 << 36) - 1) == [RET_PF_EMULATE]
    assert len(mmu.direct_map) == 1


def test_read_only_slots_are_mapped_for_reads_and_emulate_writes():
    mmu = _mmu()
    assert _results(mmu, ROM) == [RET_PF_FIXED]
    assert _results(mmu, ROM, FETCH) == []
    assert ept_access(mmu, ROM, WRITE) == [(RET_PF_EMULATE, EMULTYPE_PF)]
    assert mmu.mmio.gfn == 0
    assert _results(mmu, ROM) == []


def test_invalid_slots_are_retried():
    mmu = _mmu()
    mmu.slots.gfn_to_memslot(1).flags |= 1 << 16
    assert kvm_mmu_page_fault(mmu, RAM, WRITE).result == RET_PF_RETRY


def test_tracked_frames_emulate_writes_and_allow_a_retry():
    mmu = _mmu()
    _results(mmu, RAM, WRITE)
    mmu.write_track_add_gfn(1)
    assert ept_access(mmu, RAM, WRITE) == [(RET_PF_EMULATE, EMULTYPE_PF | EMULTYPE_ALLOW_RETRY_PF)]
    assert _results(mmu, RAM) == []
    mmu.write_track_remove_gfn(1)
    assert _results(mmu, RAM, WRITE) == [RET_PF_FIXED]


def test_a_first_write_to_a_tracked_frame_is_seen_when_it_is_mapped():
    mmu = _mmu()
    mmu.write_track_add_gfn(1)
    assert ept_access(mmu, RAM, WRITE) == [(RET_PF_EMULATE, EMULTYPE_PF | EMULTYPE_ALLOW_RETRY_PF)]


def test_l2_is_not_allowed_a_retry():
    mmu = _mmu()
    mmu.write_track_add_gfn(1)
    mmu.vcpu.in_guest_mode = True
    assert ept_access(mmu, RAM, WRITE) == [(RET_PF_EMULATE, EMULTYPE_PF)]


def _shadowed(mmu, gfn):
    role = ShadowRole(1, ACC_ALL, False, 0, guest_paging(mmu.vcpu).role, False, True)
    sp = mmu.shadow._alloc(gfn, role)
    mmu.write_track_add_gfn(gfn)
    return sp


def test_the_guests_own_walk_unprotects_and_retries_once():
    """A page table of the guest that is shadowed for L2: the processor's A/D writes must not be emulated."""
    mmu = _mmu()
    sp = _shadowed(mmu, 1)
    error = PFERR_GUEST_PAGE_MASK | PFERR_WRITE_MASK | PFERR_PRESENT_MASK
    assert kvm_mmu_page_fault(mmu, RAM, error) == (RET_PF_RETRY, EMULTYPE_PF)
    assert sp.invalid
    assert (mmu.last_retry_eip, mmu.last_retry_addr) == (0x1000, RAM)
    assert kvm_mmu_page_fault(mmu, RAM, error) == (RET_PF_EMULATE, EMULTYPE_PF)
    mmu.vcpu.rip += 1
    assert kvm_mmu_page_fault(mmu, RAM, error) == (RET_PF_EMULATE, EMULTYPE_PF | EMULTYPE_ALLOW_RETRY_PF)
    assert (mmu.last_retry_eip, mmu.last_retry_addr) == (0, 0)


def test_the_access_itself_is_emulated_though_shadowed():
    mmu = _mmu()
    sp = _shadowed(mmu, 1)
    error = PFERR_GUEST_FINAL_MASK | PFERR_WRITE_MASK | PFERR_PRESENT_MASK
    assert kvm_mmu_page_fault(mmu, RAM, error) == (RET_PF_EMULATE, EMULTYPE_PF | EMULTYPE_ALLOW_RETRY_PF)
    assert not sp.invalid


def test_dirty_logging_takes_w_away_and_gives_it_back():
    memory = GuestMemory({})
    memory.set_memory_region(0, 1, 1)
    mmu = make_mmu(memory)
    _results(mmu, RAM, WRITE)
    memory.set_memory_region(0, 1, 1, KVM_MEM_LOG_DIRTY_PAGES)
    assert not mmu.direct_map[1] & PT_WRITABLE_MASK
    assert _results(mmu, RAM) == []
    assert memory.dirty == set()
    assert _results(mmu, RAM, WRITE) == [RET_PF_FIXED]
    assert mmu.stats["pf_fast"] == 1
    slot = mmu.slots.gfn_to_memslot(1)
    assert memory.get_dirty_log(slot) == [1]
    assert _results(mmu, RAM, WRITE) == [RET_PF_FIXED]


def test_a_stale_tlb_entry_makes_a_spurious_fault():
    mmu = _mmu()
    _results(mmu, RAM, WRITE)
    assert kvm_mmu_page_fault(mmu, RAM, PFERR_WRITE_MASK | PFERR_PRESENT_MASK).result == RET_PF_SPURIOUS
    assert kvm_mmu_page_fault(mmu, RAM, PFERR_WRITE_MASK).result == RET_PF_SPURIOUS
    assert mmu.stats["pf_spurious"] == 2


@pytest.mark.parametrize(
    ("guest_mode", "apicv", "expected", "mapped"),
    [
        (False, False, RET_PF_EMULATE, False),
        (False, True, RET_PF_FIXED, True),
        (True, True, RET_PF_EMULATE, True),
    ],
)
def test_the_apic_access_page(guest_mode, apicv, expected, mapped):
    memory = GuestMemory({})
    memory.set_private_page(APIC_ACCESS_PAGE_PRIVATE_MEMSLOT, 0xFEE00)
    mmu = make_mmu(memory)
    mmu.vcpu.in_guest_mode = guest_mode
    mmu.vcpu.apicv_activated = apicv
    assert _results(mmu, 0xFEE00000) == [expected]
    assert bool(mmu.direct_map) == mapped
    assert mmu.mmio.gfn == (0xFEE00 if guest_mode else 0)


def test_smm_and_l2_have_their_own_maps():
    mmu = _mmu()
    _results(mmu, RAM)
    mmu.vcpu.in_guest_mode = True
    assert _results(mmu, RAM) == [RET_PF_FIXED]
    mmu.vcpu.smm = True
    assert _results(mmu, RAM) == [RET_PF_EMULATE]


@pytest.mark.parametrize("quirk", [True, False])
def test_deleting_a_slot_drops_its_translations(quirk):
    mmu = _mmu(disabled_quirks=frozenset() if quirk else frozenset({"slot_zap_all"}))
    _results(mmu, RAM, WRITE)
    _results(mmu, ROM)
    mmu.memory.set_memory_region(0, 1, 0)
    assert 1 not in mmu.direct_map
    assert (2 in mmu.direct_map) == (not quirk)
    assert _results(mmu, RAM) == [RET_PF_EMULATE]


@pytest.mark.parametrize(
    ("qualification", "error"),
    [
        (1, PFERR_USER_MASK),
        (2, PFERR_WRITE_MASK),
        (4, PFERR_FETCH_MASK),
        (2 | 1 << 3, PFERR_WRITE_MASK | PFERR_PRESENT_MASK),
        (2 | 1 << 5, PFERR_WRITE_MASK | PFERR_PRESENT_MASK),
        (1 | 1 << 7, PFERR_USER_MASK | PFERR_GUEST_PAGE_MASK),
        (1 | 3 << 7, PFERR_USER_MASK | PFERR_GUEST_FINAL_MASK),
        (1 | 1 << 8, PFERR_USER_MASK),
    ],
)
def test_exit_qualification_becomes_an_error_code(qualification, error):
    assert ept_violation_error_code(qualification) == error


def test_the_qualification_has_the_rights_of_the_entry_and_what_was_translated():
    mmu = _mmu()
    _results(mmu, ROM)
    access = WRITE | PFERR_GUEST_FINAL_MASK
    assert ept_exit(mmu, ROM, access) == (EXIT_REASON_EPT_VIOLATION, 2 | 5 << 3 | 3 << 7)
    assert ept_exit(mmu, HOLE, PFERR_GUEST_PAGE_MASK) == (EXIT_REASON_EPT_VIOLATION, 3 | 1 << 7)


def test_invlpg_leaves_the_mmio_cache_to_ept_guests_alone():
    mmu = _mmu()
    mmu.mmio.store(mmu.slots.generation, 0x7000, 9, 0)
    mmu.invlpg(0x7123)
    assert mmu.mmio.gva == 0x7000
    assert (mmu.stats["invlpg"], mmu.flushes["tlb_gva"]) == (1, 1)
    mmu.invlpg(1 << 60)
    assert (mmu.stats["invlpg"], mmu.flushes["tlb_gva"]) == (2, 1)


@pytest.mark.parametrize(("la57", "flushed"), [(False, 0), (True, 1)])
def test_invlpg_is_canonical_for_the_host(la57, flushed):
    mmu = _mmu(host_la57=la57)
    mmu.invlpg(1 << 47)
    assert mmu.flushes["tlb_gva"] == flushed
    mmu.invlpg(0xFFFF_8000_0000_0000)
    assert mmu.flushes["tlb_gva"] == flushed + 1


def test_a_guest_without_paging_is_mapped_directly_without_ept():
    memory = GuestMemory({})
    memory.set_memory_region(0, 1, 1)
    mmu = make_mmu(memory, ept=False)
    assert mmu.direct
    assert kvm_mmu_page_fault(mmu, HOLE, WRITE) == (RET_PF_EMULATE, EMULTYPE_PF)
    assert (mmu.mmio.gva, mmu.mmio.gfn) == (HOLE, HOLE >> 12)
    assert kvm_mmu_page_fault(mmu, RAM, WRITE).result == RET_PF_FIXED


def test_ept_ignores_the_guests_tables():
    chain = Chain("4-level")
    mmu = make_mmu(chain.memory, chain.state)
    assert mmu.direct
    assert _results(mmu, 0x10000) == [RET_PF_FIXED]


def _hardware_walk(mmu, access=0):
    """The exits until an access of a linear address is through."""
    exits = []
    while (done := ept_guest_access(mmu, ADDR, access)).exit_reason:
        exits.append((done.gpa >> 12, done.qualification & 0x187))
        kvm_mmu_page_fault(mmu, done.gpa, ept_violation_error_code(done.qualification))
    return exits, done


def test_the_guests_tables_fault_before_the_page():
    chain = Chain("4-level")
    chain.memory.set_memory_region(1, TARGET, 1)
    mmu = make_mmu(chain.memory, chain.state)
    exits, done = _hardware_walk(mmu, WRITE)
    tables = [(frame, 3 | 1 << 7) for frame in range(ROOT, ROOT + 4)]
    assert exits == [*tables, (TARGET, 2 | 3 << 7)]
    assert done == (0, 0, TARGET << 12 | ADDR & 0xFFF, None)
    assert _hardware_walk(mmu)[0] == []


def test_a_guest_fault_comes_after_the_tables_that_were_read():
    chain = Chain("4-level", {2: 0})
    mmu = make_mmu(chain.memory, chain.state)
    exits, done = _hardware_walk(mmu, WRITE)
    assert [frame for frame, _ in exits] == [ROOT, ROOT + 1, ROOT + 2]
    assert done.fault is not None
    assert done.fault.error_code == WRITE


def test_a_table_in_a_hole_is_an_exit_not_a_guest_fault():
    chain = Chain("4-level")
    mmu = make_mmu(chain.memory, chain.state)
    mmu.vcpu.cr3 = HOLE
    done = ept_guest_access(mmu, ADDR, 0)
    assert (done.exit_reason, done.qualification, done.gpa) == (
        EXIT_REASON_EPT_VIOLATION,
        3 | 1 << 7,
        HOLE + 8 * (ADDR >> 39),
    )


def test_without_paging_the_linear_address_is_physical():
    mmu = _mmu()
    assert ept_guest_access(mmu, RAM, FETCH) == (EXIT_REASON_EPT_VIOLATION, 4 | 3 << 7, RAM, None)
    _results(mmu, RAM)
    assert ept_guest_access(mmu, RAM, FETCH) == (0, 0, RAM, None)


def test_an_mmio_cache_hit_on_a_protected_frame_is_emulated_without_retry():
    mmu = _mmu()
    mmu.write_track_add_gfn(1)
    mmu.mmio.store(mmu.slots.generation, 0, 1, 0)
    assert kvm_mmu_write_protect_fault(mmu, RAM, WRITE) == (RET_PF_EMULATE, 0)


def test_losing_w_flushes_only_if_there_was_one():
    mmu = _mmu()
    mmu.write_track_add_gfn(1)
    assert mmu.flushes["remote_tlb_gfn"] == 0
    mmu.write_track_remove_gfn(1)
    _results(mmu, RAM, WRITE)
    mmu.write_track_add_gfn(1)
    mmu.write_track_add_gfn(1)
    assert mmu.flushes["remote_tlb_gfn"] == 1
    mmu.write_track_remove_gfn(1)
    assert mmu.write_tracked == {1: 1}


def test_write_protection_of_nothing_is_an_ordinary_fault():
    assert kvm_mmu_page_fault(_mmu(), RAM, PFERR_WRITE_MASK | PFERR_PRESENT_MASK).result == RET_PF_FIXED


def test_mapping_a_logged_frame_makes_it_dirty_even_for_a_read():
    memory = GuestMemory({})
    memory.set_memory_region(0, 1, 1, KVM_MEM_LOG_DIRTY_PAGES)
    mmu = make_mmu(memory)
    assert _results(mmu, RAM) == [RET_PF_FIXED]
    assert memory.dirty == {(0, 1)}


def test_page_tables_in_rom_are_emulated():
    """EPT's accessed and dirty flags make the walk a write, which a read-only slot never allows."""
    chain = Chain("4-level", slot_flags=KVM_MEM_READONLY)
    mmu = make_mmu(chain.memory, chain.state)
    done = ept_guest_access(mmu, ADDR, READ)
    error = ept_violation_error_code(done.qualification)
    assert error == PFERR_USER_MASK | PFERR_WRITE_MASK | PFERR_GUEST_PAGE_MASK
    assert kvm_mmu_page_fault(mmu, done.gpa, error) == (RET_PF_EMULATE, EMULTYPE_PF)
