"""Accessed and dirty flags (SDM Vol. 3A 4.8): which entries are written, and when none is."""

from __future__ import annotations

import struct

import pytest
from support.page_tables import ADDR, ALL, ROOT, TARGET, TOP, A, Chain, D, P, U, W, paging_state

from emufuzz.kvm.memslots import KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, GuestMemory
from emufuzz.kvm.mmu.pferr import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from emufuzz.kvm.mmu.walker import walk_addr_generic

CLEAN = P | W | U


def _levels(mode):
    return range(1, 3 if mode == "pae" else TOP[mode] + 1)


@pytest.mark.parametrize("mode", ["2-level", "pae", "4-level", "5-level"])
@pytest.mark.parametrize("write", [False, True])
def test_a_goes_everywhere_d_only_to_the_page_written(mode, write):
    chain = Chain(mode, dict.fromkeys(_levels(mode), CLEAN))
    before = {level: chain.entry(level) for level in _levels(mode)}
    walker = chain.walk(PFERR_WRITE_MASK if write else 0)
    assert walker.fault is None
    for level in _levels(mode):
        expected = before[level] | A | (D if write and level == 1 else 0)
        assert chain.entry(level) == walker.ptes[level] == expected


@pytest.mark.parametrize(
    ("mode", "leaf"), [("2-level", 2), ("pae", 2), ("4-level", 2), ("4-level", 3), ("5-level", 3)]
)
def test_large_pages_are_dirtied_in_their_own_entry(mode, leaf):
    chain = Chain(mode, {leaf: CLEAN}, leaf=leaf)
    assert chain.walk(PFERR_WRITE_MASK).fault is None
    assert chain.entry(leaf) & (A | D) == A | D
    assert chain.entry(TOP[mode] if mode != "pae" else 2) & A


@pytest.mark.parametrize("which", [1, 2, 3, 4])
def test_one_missing_a_is_enough_to_write(which):
    chain = Chain("4-level", {which: ALL & ~A})
    assert chain.walk().fault is None
    assert chain.entry(which) & A


def test_nothing_is_written_when_all_is_set():
    chain = Chain("4-level")
    assert chain.walk(PFERR_WRITE_MASK).fault is None
    assert not chain.memory.written


def test_nothing_is_written_when_the_access_faults():
    chain = Chain("4-level", {4: CLEAN, 3: CLEAN, 2: CLEAN, 1: P})
    assert chain.error(PFERR_USER_MASK | PFERR_WRITE_MASK) == 7
    assert not chain.memory.written


def test_read_only_tables_keep_their_flags_and_work():
    chain = Chain("4-level", dict.fromkeys(range(1, 5), CLEAN), slot_flags=KVM_MEM_READONLY)
    assert chain.walk(PFERR_WRITE_MASK).gfn == TARGET
    assert not chain.memory.written


def test_tables_are_marked_dirty():
    chain = Chain("4-level", {3: CLEAN, 1: CLEAN}, slot_flags=KVM_MEM_LOG_DIRTY_PAGES)
    chain.walk()
    assert chain.memory.dirty == {(0, ROOT + 1), (0, ROOT + 3)}


@pytest.mark.parametrize("mode", ["2-level", "4-level"])
def test_a_clean_page_is_not_writable_after_a_read(mode):
    clean = Chain(mode, {1: ALL & ~D}).walk()
    assert clean.pte_access == ACC_EXEC_MASK | ACC_USER_MASK
    assert Chain(mode).walk().pte_access & ACC_WRITE_MASK
    assert Chain(mode, {1: ALL & ~D}).walk(PFERR_WRITE_MASK).pte_access & ACC_WRITE_MASK


@pytest.mark.parametrize("mode", ["2-level", "4-level"])
def test_an_entry_that_serves_at_two_levels_makes_the_walk_start_again(mode):
    """A table that maps itself: setting A at the upper level changes the entry of the lower one."""
    state = paging_state(mode)
    entry = ROOT << 12 | CLEAN
    raw = struct.pack("<I" if mode == "2-level" else "<Q", entry)
    memory = GuestMemory({ROOT: raw * (4096 // len(raw))})
    memory.set_memory_region(0, ROOT, 1)
    addr = 0x123 if mode == "2-level" else 0x0
    walker = walk_addr_generic(state, memory.spaces[0], addr, PFERR_WRITE_MASK)
    assert walker.fault is None
    assert walker.gfn == ROOT
    data = memory.spaces[0].read_guest(ROOT << 12, len(raw))
    assert int.from_bytes(data, "little") == entry | A | D
    assert walker.ptes[1] == entry | A | D
    other = memory.spaces[0].read_guest((ROOT << 12) + len(raw), len(raw))
    assert int.from_bytes(other, "little") == entry


def test_addr_constant_covers_every_level():
    assert ADDR >> 12 & 511 == 1
    assert ADDR >> 21 & 511 == 1
    assert ADDR >> 30 & 3 == 1
