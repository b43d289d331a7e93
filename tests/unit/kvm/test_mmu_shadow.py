"""Shadow paging: the guest's own faults, tables that go out of sync, writes to tables, retries."""

from __future__ import annotations

import struct

import pytest
from support.mmu import make_mmu, shadow_access
from support.page_tables import ADDR, ALL, MODES, NX, ROOT, TARGET, TOP, A, Chain, D, P, U, W

from emufuzz.arch.cr import EFER_NX, X86_CR0_WP, X86_CR4_SMAP, X86_CR4_SMEP
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.kvm.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEMSLOT_INVALID
from emufuzz.kvm.mmu.fault import PageFault
from emufuzz.kvm.mmu.hardware import shadow_exit
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault, kvm_mmu_unprotect_gfn_and_retry
from emufuzz.kvm.mmu.paging import guest_paging
from emufuzz.kvm.mmu.pferr import (
    EMULTYPE_ALLOW_RETRY_PF,
    EMULTYPE_PF,
    EMULTYPE_WRITE_PF_TO_SP,
    PFERR_FETCH_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_PRESENT_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_FIXED,
    RET_PF_RETRY,
    RET_PF_SPURIOUS,
)
from emufuzz.kvm.mmu.shadow_fault import fetch
from emufuzz.kvm.mmu.walker import walk_addr_generic

WRITE, USER, FETCH, PRESENT = PFERR_WRITE_MASK, PFERR_USER_MASK, PFERR_FETCH_MASK, PFERR_PRESENT_MASK
SECOND = ADDR + 0x1000  # the next entry of the same last-level table
LARGE = [("2-level", 2), ("pae", 2), ("4-level", 2), ("4-level", 3), ("5-level", 3)]


class Guest:
    """A chain with RAM behind ADDR, under shadow paging."""

    def __init__(self, mode="4-level", flags=None, leaf=1, *, ram_flags=0, **registers):
        self.chain = Chain(mode, flags, leaf, **registers)
        self.memory = self.chain.memory
        self.chain.state.rflags |= X86_EFLAGS_AC
        gfn = self.chain.walk().gfn
        self.chain.state.rflags &= ~X86_EFLAGS_AC
        self.memory.written.clear()
        self.gfn = gfn
        if gfn >= ROOT + 0x10:
            self.memory.set_memory_region(1, gfn, 4, ram_flags)
        self.mmu = make_mmu(self.memory, self.chain.state, ept=False)

    def run(self, access=0, addr=ADDR):
        return [result.result for result in shadow_access(self.mmu, addr, access)]

    def store(self, level, value, offset=0):
        """The emulator writes an entry, as emulator_write_phys does."""
        size = self.chain.size
        gpa = self.chain.pte_gpa[level] + offset
        assert self.mmu.slots.write_guest(gpa, value.to_bytes(size, "little")) == 0
        self.mmu.shadow.track_write(gpa, size)

    @property
    def leaf(self):
        return self.mmu.shadow.indirect_pages(self.chain.pte_gpa[1] >> 12)[0]


@pytest.mark.parametrize("mode", MODES)
def test_an_access_is_fixed_once(mode):
    guest = Guest(mode)
    assert guest.run(WRITE) == [RET_PF_FIXED]
    assert guest.run(USER) == guest.run(USER | WRITE) == []


@pytest.mark.parametrize(("mode", "leaf"), LARGE)
def test_large_guest_pages_are_split(mode, leaf):
    guest = Guest(mode, leaf=leaf)
    assert guest.run(WRITE) == [RET_PF_FIXED]
    assert guest.run() == []
    direct = [sp for pages in guest.mmu.shadow.by_gfn.values() for sp in pages if sp.role.direct]
    assert len(direct) == leaf - 1


@pytest.mark.parametrize("mode", MODES)
def test_the_guest_gets_its_own_faults(mode):
    guest = Guest(mode, {1: P | W | A | D})
    assert guest.run(USER | WRITE) == [RET_PF_RETRY]
    fault = guest.mmu.vcpu.injected[0]
    assert (fault.vector, fault.error_code, fault.address) == (14, PRESENT | USER | WRITE, ADDR)


def test_accessed_and_dirty_flags_reach_the_guests_tables():
    guest = Guest(flags=dict.fromkeys(range(1, 5), P | W | U))
    for level in (1, 2, 3, 4):
        guest.chain.slots.write_guest(guest.chain.pte_gpa[level], bytes([P | W | U]))
    assert guest.run() == [RET_PF_FIXED]
    assert guest.chain.entry(1) & (A | D) == A
    # the page is clean: the first write faults and sets D
    assert guest.run(WRITE) == [RET_PF_FIXED]
    assert guest.chain.entry(1) & D
    assert guest.chain.entry(4) & (A | D) == A


def test_a_hole_is_emulated_and_cached():
    guest = Guest()
    guest.memory.set_memory_region(1, TARGET, 0)
    assert guest.run() == [RET_PF_EMULATE]
    assert (guest.mmu.mmio.gva, guest.mmu.mmio.gfn) == (ADDR & ~0xFFF, TARGET)
    assert guest.run(WRITE) == [RET_PF_EMULATE]
    assert guest.mmu.stats["pf_mmio_spte_created"] == 1


def test_a_new_slot_replaces_the_mmio_entry():
    guest = Guest()
    guest.memory.set_memory_region(1, TARGET, 0)
    guest.run()
    guest.memory.set_memory_region(1, TARGET, 1)
    assert guest.run() == [RET_PF_FIXED]


def test_read_only_slots_emulate_writes():
    guest = Guest(ram_flags=KVM_MEM_READONLY)
    assert guest.run() == [RET_PF_FIXED]
    assert guest.run(WRITE) == [RET_PF_EMULATE]
    assert guest.run() == []


@pytest.mark.parametrize("smep", [False, True])
def test_supervisor_writes_without_wp(smep):
    """Hardware runs with WP = 1, so the page becomes writable and the supervisor's alone."""
    guest = Guest(flags={1: P | U | A | D}, cr4=X86_CR4_SMEP * smep, efer=EFER_NX)
    assert guest.run(USER) == [RET_PF_FIXED]
    assert guest.run(WRITE) == [RET_PF_FIXED]
    assert guest.mmu.masks.access(guest.mmu.get_spte(ADDR)) == (2 if smep else 3)
    assert guest.run(USER) == [RET_PF_FIXED]


def test_wp_faults_go_to_the_guest():
    guest = Guest(flags={1: P | U | A | D}, cr0=X86_CR0_WP)
    assert guest.run(WRITE) == [RET_PF_RETRY]
    assert guest.mmu.vcpu.injected[0].error_code == PRESENT | WRITE


@pytest.mark.parametrize(("cr4", "access"), [(X86_CR4_SMAP, 0), (X86_CR4_SMEP, FETCH)])
def test_smap_and_smep_hold_on_the_shadow_entries(cr4, access):
    guest = Guest(cr4=cr4)
    assert guest.run(USER) == [RET_PF_FIXED]
    assert shadow_exit(guest.mmu, ADDR, access) == PRESENT | access
    assert guest.run(access) == [RET_PF_RETRY]
    guest.mmu.vcpu.rflags |= X86_EFLAGS_AC
    assert (shadow_exit(guest.mmu, ADDR, access) is None) == (cr4 == X86_CR4_SMAP)


def test_nx_holds_on_the_shadow_entries():
    guest = Guest(flags={2: ALL | NX}, efer=EFER_NX)
    assert guest.run() == [RET_PF_FIXED]
    assert guest.run(FETCH) == [RET_PF_RETRY]
    assert guest.mmu.vcpu.injected[0].error_code == PRESENT | FETCH


# -- tables of the last level go out of sync ---------------------------------------------------


def _map_table(guest, level):
    """Let SECOND map the guest's own table of a level, writable."""
    frame = guest.chain.pte_gpa[level] >> 12
    guest.store(1, frame << 12 | ALL, offset=guest.chain.size)
    return SECOND


@pytest.mark.parametrize("mode", MODES)
def test_a_last_level_table_is_written_natively(mode):
    guest = Guest(mode)
    guest.run(WRITE)
    assert guest.leaf.unsync is False
    alias = _map_table(guest, 1)
    assert guest.run(WRITE, alias) == [RET_PF_FIXED]
    assert all(sp.unsync for sp in guest.mmu.shadow.indirect_pages(guest.chain.pte_gpa[1] >> 12))
    # what the guest writes now shows after INVLPG, not before
    guest.chain.slots.write_guest(guest.chain.pte_gpa[1], bytes(guest.chain.size))
    assert shadow_exit(guest.mmu, ADDR, 0) is None
    guest.mmu.invlpg(ADDR)
    assert shadow_exit(guest.mmu, ADDR, 0) == 0
    assert guest.mmu.flushes["remote_tlb_gfn"] > 0


def test_cr3_synchronises_and_protects_again():
    guest = Guest()
    guest.run(WRITE)
    alias = _map_table(guest, 1)
    guest.run(WRITE, alias)
    guest.chain.slots.write_guest(guest.chain.pte_gpa[1], struct.pack("<Q", TARGET + 1 << 12 | ALL))
    guest.mmu.new_pgd()
    assert shadow_exit(guest.mmu, ADDR, 0) == 0
    assert guest.leaf.unsync is False
    assert shadow_exit(guest.mmu, alias, WRITE) == PRESENT | WRITE
    assert guest.run() == [RET_PF_FIXED]


def test_less_rights_are_taken_over_by_synchronising():
    guest = Guest()
    guest.run(WRITE)
    guest.run(WRITE, _map_table(guest, 1))
    guest.chain.slots.write_guest(guest.chain.pte_gpa[1], struct.pack("<Q", TARGET << 12 | ALL & ~W))
    guest.mmu.invlpg(ADDR)
    assert shadow_exit(guest.mmu, ADDR, 0) is None
    assert shadow_exit(guest.mmu, ADDR, WRITE) == PRESENT | WRITE


@pytest.mark.parametrize("value", [TARGET << 12 | P | W, TARGET << 12 | ALL | 1 << 51, 0])
def test_entries_without_a_or_with_reserved_bits_are_dropped(value):
    guest = Guest(maxphyaddr=46)
    guest.run(WRITE)
    guest.run(WRITE, _map_table(guest, 1))
    guest.chain.slots.write_guest(guest.chain.pte_gpa[1], struct.pack("<Q", value))
    guest.mmu.invlpg(ADDR)
    assert shadow_exit(guest.mmu, ADDR, 0) == 0


def test_an_mmio_entry_is_synchronised_too():
    guest = Guest()
    guest.memory.set_memory_region(1, TARGET, 0)
    guest.run()
    guest.run(WRITE, _map_table(guest, 1))
    leaf = guest.chain.pte_gpa[1]
    guest.chain.slots.write_guest(leaf, struct.pack("<Q", TARGET << 12 | ALL & ~W))
    guest.mmu.invlpg(ADDR)
    assert guest.mmu.masks.get_mmio_spte_access(guest.mmu.get_spte(ADDR)) == 4
    guest.chain.slots.write_guest(leaf, struct.pack("<Q", TARGET + 8 << 12 | ALL))
    guest.mmu.invlpg(ADDR)
    assert shadow_exit(guest.mmu, ADDR, 0) == 0


# -- upper tables are write-tracked ------------------------------------------------------------


# the PDPTEs of PAE paging are cached, their table is ordinary memory
UPPER = [(mode, level) for mode in MODES for level in range(2, TOP[mode] + 1) if (mode, level) != ("pae", 3)]


@pytest.mark.parametrize(("mode", "level"), UPPER)
def test_writes_to_upper_tables_are_emulated(mode, level):
    guest = Guest(mode)
    guest.run(WRITE)
    alias = _map_table(guest, level)
    assert guest.run(0, alias) == [RET_PF_FIXED]
    assert shadow_access(guest.mmu, alias, WRITE) == [(RET_PF_EMULATE, EMULTYPE_PF | EMULTYPE_ALLOW_RETRY_PF)]


def test_the_pdpte_table_is_ordinary_memory():
    guest = Guest("pae")
    guest.run(WRITE)
    assert guest.run(WRITE, _map_table(guest, 3)) == [RET_PF_FIXED]


@pytest.mark.parametrize("level", [2, 3, 4])
def test_a_first_write_to_a_table_on_its_own_path_is_flagged(level):
    guest = Guest()
    guest.run(WRITE)
    alias = _map_table(guest, level)
    expected = EMULTYPE_PF | EMULTYPE_ALLOW_RETRY_PF | (EMULTYPE_WRITE_PF_TO_SP if level < 4 else 0)
    assert shadow_access(guest.mmu, alias, WRITE) == [(RET_PF_EMULATE, expected)]


def test_events_that_wait_make_it_unprotect_and_retry_once():
    guest = Guest()
    guest.run(WRITE)
    alias = _map_table(guest, 2)
    guest.run(0, alias)
    guest.mmu.vcpu.reinjection = True
    error = PRESENT | WRITE
    assert kvm_mmu_page_fault(guest.mmu, alias, error) == (RET_PF_RETRY, EMULTYPE_PF)
    assert (guest.mmu.last_retry_eip, guest.mmu.last_retry_addr) == (0x1000, alias)
    assert guest.mmu.shadow.indirect_pages(guest.chain.pte_gpa[2] >> 12) == []
    second = shadow_access(guest.mmu, alias, WRITE)
    # The walk shadows the table anew, the same instruction writes to it again: now it is emulated.
    assert second == [(RET_PF_EMULATE, EMULTYPE_PF | EMULTYPE_WRITE_PF_TO_SP)]


def test_unprotecting_needs_shadow_pages_and_a_translation():
    guest = Guest()
    assert not kvm_mmu_unprotect_gfn_and_retry(guest.mmu, ADDR)
    assert guest.mmu.last_retry_eip == 0
    assert not kvm_mmu_unprotect_gfn_and_retry(guest.mmu, ADDR, always_retry=True)
    assert (guest.mmu.last_retry_eip, guest.mmu.last_retry_addr) == (0x1000, ADDR)
    guest.run(WRITE)
    assert not kvm_mmu_unprotect_gfn_and_retry(guest.mmu, ADDR)
    assert not kvm_mmu_unprotect_gfn_and_retry(guest.mmu, 0)
    alias = _map_table(guest, 2)
    assert kvm_mmu_unprotect_gfn_and_retry(guest.mmu, alias)
    assert guest.mmu.flushes["remote_tlb"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("level", [1, 2])
def test_emulated_writes_to_tables_clear_the_shadow_entry(mode, level):
    guest = Guest(mode)
    guest.run(WRITE)
    guest.store(level, 0)
    assert shadow_exit(guest.mmu, ADDR, 0) == 0
    assert guest.run() == [RET_PF_RETRY]


def test_three_writes_without_a_fault_between_give_the_page_up():
    guest = Guest()
    guest.run(WRITE)
    frame = guest.chain.pte_gpa[2] >> 12
    for expected in (1, 1, 0):
        guest.store(2, 0, offset=0x800)
        assert len(guest.mmu.shadow.indirect_pages(frame)) == expected
    assert guest.mmu.stats["mmu_flooded"] == 1
    # the page below was only unlinked: it is found again with its entry
    assert guest.run() == [RET_PF_SPURIOUS]


def test_a_page_fault_through_a_table_ends_the_flood():
    guest = Guest()
    guest.run(WRITE)
    for _ in range(5):
        guest.store(2, 0, offset=0x800)
        guest.store(1, TARGET << 12 | ALL)
        assert guest.run() == [RET_PF_FIXED]
    assert guest.mmu.stats["mmu_flooded"] == 0


@pytest.mark.parametrize(
    ("offset", "size", "zapped"),
    [
        (0, 8, False),
        (0, 4, False),
        (4, 4, False),
        (0, 1, False),
        (1, 1, True),
        (0, 2, True),
        (4, 8, True),
        (2, 4, False),
    ],
)
def test_writes_that_do_not_look_like_an_entry_give_the_page_up(offset, size, zapped):
    guest = Guest()
    guest.run(WRITE)
    gpa = (guest.chain.pte_gpa[1] & ~7) + 0x400 + offset
    guest.mmu.shadow.track_write(gpa, size)
    assert (guest.mmu.shadow.indirect_pages(gpa >> 12) == []) == zapped


def test_32_bit_tables_have_quadrants():
    guest = Guest("2-level", addr=0xC0201123)
    guest.mmu.vcpu.cr3 = guest.chain.state.cr3
    assert [r.result for r in shadow_access(guest.mmu, 0xC0201123, WRITE)] == [RET_PF_FIXED]
    roots = guest.mmu.shadow.roots
    assert [root.role.quadrant for root in roots] == [0, 1, 2, 3]
    assert len({root.gfn for root in roots}) == 1
    # a write to the directory entry clears both 2 MiB halves of the quadrant it belongs to
    guest.store(2, 0)
    assert not roots[3].children


def test_pae_roots_follow_the_pdptrs():
    guest = Guest("pae")
    guest.run()
    assert [root is not None for root in guest.mmu.shadow.roots] == [False, True, False, False]


def test_a_root_outside_of_memory_faults_in_the_guest():
    guest = Guest()
    guest.mmu.vcpu.cr3 = 0x7FFF000
    guest.mmu.new_pgd()
    assert guest.run() == [RET_PF_RETRY]
    assert guest.mmu.vcpu.injected[0].error_code == 0
    assert guest.mmu.shadow.roots == []


def test_pages_are_shared_by_roots_but_not_by_modes():
    guest = Guest()
    guest.run()
    pages = sum(map(len, guest.mmu.shadow.by_gfn.values()))
    guest.mmu.reset_context()
    assert guest.run() == []
    guest.mmu.vcpu.cr0 ^= X86_CR0_WP
    guest.mmu.reset_context()
    assert guest.run() == [RET_PF_FIXED]
    assert sum(map(len, guest.mmu.shadow.by_gfn.values())) == 2 * pages


def test_deleting_a_slot_takes_all_shadow_pages():
    guest = Guest()
    guest.run(WRITE)
    guest.memory.set_memory_region(1, TARGET, 0)
    assert guest.mmu.shadow.by_gfn == {}
    assert guest.mmu.shadow.rmap == {}
    assert not guest.mmu.write_tracked
    assert guest.run() == [RET_PF_EMULATE]


def test_a_frame_that_becomes_an_upper_table_gives_up_its_unsync_page():
    guest = Guest()
    guest.run(WRITE)
    guest.run(WRITE, _map_table(guest, 1))
    frame = guest.chain.pte_gpa[1] >> 12
    leaf = guest.leaf
    assert leaf.unsync
    # another entry of the third level uses the last-level table as a directory
    guest.store(3, frame << 12 | ALL, offset=8)
    guest.chain.slots.write_guest((TARGET << 12) + 8, struct.pack("<Q", TARGET + 1 << 12 | ALL))
    other = ADDR + (1 << 30)
    guest.run(0, other)
    assert leaf.invalid


def test_stale_entries_in_hardware_are_spurious():
    guest = Guest()
    guest.run(WRITE)
    assert kvm_mmu_page_fault(guest.mmu, ADDR, PRESENT | WRITE).result == RET_PF_SPURIOUS


def test_tables_are_synchronised_before_they_are_linked_again():
    """Hardware may not cache what was not present, so the guest owes no flush when it becomes present."""
    guest = Guest()
    guest.run(WRITE)
    guest.run(WRITE, _map_table(guest, 1))
    assert guest.leaf.unsync
    upper = guest.chain.entry(3)
    guest.store(3, 0)
    guest.chain.slots.write_guest(guest.chain.pte_gpa[1], bytes(8))
    guest.store(3, upper)
    assert guest.run(0, SECOND)[-1] in {RET_PF_FIXED, RET_PF_SPURIOUS}
    assert shadow_exit(guest.mmu, ADDR, 0) == 0


@pytest.mark.parametrize("level", [1, 2])
def test_a_write_clears_its_own_quadrant_only(level):
    guest = Guest("2-level")
    # two entries half a table apart; those of the directory lead to the same table, mapped already
    other = ADDR ^ (1 << 31 if level == 2 else 1 << 21)
    size = guest.chain.size
    distance = size << 9
    entry = guest.chain.entry(level)
    guest.chain.slots.write_guest(guest.chain.pte_gpa[level] ^ distance, entry.to_bytes(size, "little"))
    assert guest.run(0) == [RET_PF_FIXED]
    assert guest.run(0, other) == [RET_PF_SPURIOUS if level == 2 else RET_PF_FIXED]
    guest.store(level, 0)
    assert shadow_exit(guest.mmu, ADDR, 0) == 0
    assert shadow_exit(guest.mmu, other, 0) is None


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_an_entry_that_changed_since_the_walk_means_retry(level):
    guest = Guest()
    vcpu, slots = guest.mmu.vcpu, guest.mmu.slots
    walker = walk_addr_generic(vcpu, slots, ADDR, 0)
    slots.write_guest(guest.chain.pte_gpa[level] + 1, b"\xff")
    fault = PageFault(ADDR, 0, is_tdp=False)
    fault.gfn = walker.gfn
    fault.slot = slots.gfn_to_memslot(fault.gfn)
    assert fetch(guest.mmu, fault, walker, guest_paging(vcpu)) == RET_PF_RETRY


def _out_of_sync(**options):
    """A guest that may write natively to the table that maps ADDR (index 1) and SECOND (index 2)."""
    guest = Guest(**options)
    guest.run(WRITE)
    assert guest.run(WRITE, _map_table(guest, 1)) == [RET_PF_FIXED]
    assert guest.leaf.unsync
    return guest


def test_a_table_does_not_become_writable_by_synchronising():
    guest = _out_of_sync()
    third = SECOND + 0x1000
    entry = guest.chain.pte_gpa[1] + 16
    table = entry & ~0xFFF
    guest.chain.slots.write_guest(entry, struct.pack("<Q", table | ALL & ~W))
    assert guest.run(0, third) == [RET_PF_FIXED]
    guest.chain.slots.write_guest(entry, struct.pack("<Q", table | ALL))
    guest.mmu.invlpg(third)
    assert shadow_exit(guest.mmu, third, WRITE) == PRESENT | WRITE
    assert guest.run(WRITE, third) == [RET_PF_FIXED]


def test_a_page_that_becomes_clean_is_not_writable_any_more():
    guest = _out_of_sync()
    guest.chain.slots.write_guest(guest.chain.pte_gpa[1], struct.pack("<Q", TARGET << 12 | ALL & ~D))
    guest.mmu.invlpg(ADDR)
    assert shadow_exit(guest.mmu, ADDR, WRITE) == PRESENT | WRITE
    assert guest.run(WRITE) == [RET_PF_FIXED]
    assert guest.chain.entry(1) & D


def test_what_is_out_of_sync_goes_with_the_page_above():
    guest = _out_of_sync()
    leaf = guest.leaf
    guest.mmu.shadow.zap(guest.mmu.shadow.indirect_pages(guest.chain.pte_gpa[2] >> 12)[0])
    assert leaf.invalid
    assert guest.run() == [RET_PF_FIXED]


@pytest.mark.parametrize("how", ["invlpg", "cr3"])
def test_a_table_that_cannot_be_read_loses_its_entries(how):
    guest = _out_of_sync()
    leaf = guest.leaf
    slot = guest.mmu.slots.gfn_to_memslot(guest.chain.pte_gpa[1] >> 12)
    root_visible = guest.mmu.shadow.roots
    if how == "invlpg":
        slot.flags |= KVM_MEMSLOT_INVALID
        guest.mmu.invlpg(ADDR)
        assert 1 not in leaf.spt
        return
    slot.flags |= KVM_MEMSLOT_INVALID
    guest.mmu.shadow.sync_children(root_visible[0], guest_paging(guest.mmu.vcpu))
    assert leaf.invalid


def test_writable_entries_make_logged_frames_dirty():
    guest = Guest(ram_flags=KVM_MEM_LOG_DIRTY_PAGES)
    guest.run(WRITE)
    assert (0, guest.gfn) in guest.memory.dirty
    guest.memory.get_dirty_log(guest.mmu.slots.gfn_to_memslot(guest.gfn))
    assert guest.run(WRITE) == [RET_PF_FIXED]
    assert (0, guest.gfn) in guest.memory.dirty


def test_implicit_accesses_with_ac_set_do_not_get_on():
    """KVM deviation: a #PF does not tell that SMAP stopped an implicit access (SDM Vol. 3A 4.6.1).

    The walk takes it for an explicit one, which RFLAGS.AC permits, and finds nothing to fix.
    """
    guest = Guest(cr4=X86_CR4_SMAP)
    guest.run(USER)
    guest.mmu.vcpu.rflags |= X86_EFLAGS_AC
    for _ in range(3):
        assert shadow_exit(guest.mmu, ADDR, PFERR_IMPLICIT_ACCESS) == PRESENT
        assert kvm_mmu_page_fault(guest.mmu, ADDR, PRESENT).result == RET_PF_SPURIOUS
    assert guest.mmu.vcpu.injected == []
