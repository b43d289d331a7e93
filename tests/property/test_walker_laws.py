"""Laws of the guest walker, and of the shadow tables against it, for any tables."""

from __future__ import annotations

import struct
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st
from support.mmu import load_pdptrs, make_mmu, shadow_access
from support.page_tables import ALL, MODES, NX, P, U, W, paging_state

from emufuzz.arch.cr import EFER_NX, X86_CR0_WP, X86_CR4_SMAP, X86_CR4_SMEP
from emufuzz.kvm.memslots import GuestMemory
from emufuzz.kvm.mmu.hardware import shadow_exit
from emufuzz.kvm.mmu.pferr import PFERR_FETCH_MASK, PFERR_USER_MASK, PFERR_WRITE_MASK
from emufuzz.kvm.mmu.walker import walk_addr_generic

# Few frames and few indices, so that tables are shared, recursive and overwritten.
FRAMES = range(0x10, 0x18)
INDICES = (0, 1, 2)
ACCESSES = tuple(
    kind | user for kind in (0, PFERR_WRITE_MASK, PFERR_FETCH_MASK) for user in (0, PFERR_USER_MASK)
)

frames = st.sampled_from([*FRAMES, 0x30])  # 0x30 is a hole
flags = st.sampled_from([ALL, ALL, ALL, P | W | U, ALL & ~W, ALL & ~U, ALL & ~P, ALL | 1 << 7, ALL | NX, P])
entries = st.builds(lambda frame, bits: frame << 12 | bits, frames, flags)
places = st.tuples(st.sampled_from(FRAMES), st.sampled_from(INDICES))
tables = st.dictionaries(places, entries, max_size=24)
registers = st.builds(
    lambda wp, smep, smap: {"cr0": wp, "cr4": smep | smap, "efer": EFER_NX},
    st.sampled_from([0, X86_CR0_WP]),
    st.sampled_from([0, X86_CR4_SMEP]),
    st.sampled_from([0, X86_CR4_SMAP]),
)
modes = st.sampled_from(MODES)


def _addr(mode, indices):
    bits = 10 if mode == "2-level" else 9
    return sum(index << 12 + bits * level for level, index in enumerate(indices)) & (
        0xFFFFFFFF if mode in {"2-level", "pae"} else (1 << 57) - 1
    )


addresses = st.lists(st.sampled_from(INDICES), min_size=5, max_size=5)


def _pack(mode, entry):
    return struct.pack("<I", entry & 0xFFFFFFFF) if mode == "2-level" else struct.pack("<Q", entry)


def _guest(mode, table, regs):
    pages = {frame: bytearray(4096) for frame in FRAMES}
    for (frame, index), entry in table.items():
        raw = _pack(mode, entry)
        pages[frame][index * len(raw) : (index + 1) * len(raw)] = raw
    memory = GuestMemory({frame: bytes(page) for frame, page in pages.items()})
    memory.set_memory_region(0, FRAMES.start, len(FRAMES))
    state = paging_state(mode, **regs)
    if mode == "pae":
        pdptrs = load_pdptrs(memory.spaces[0], state.cr3, 52)
        state.pdptrs = pdptrs or [FRAMES.start + 1 << 12 | P] * 4
    return memory, state


@given(modes, tables, registers, addresses, st.sampled_from(ACCESSES))
def test_a_walk_repeated_changes_nothing_more(mode, table, regs, indices, access):
    memory, state = _guest(mode, table, regs)
    addr = _addr(mode, indices)
    first = walk_addr_generic(state, memory.spaces[0], addr, access)
    written = dict(memory.written)
    second = walk_addr_generic(state, memory.spaces[0], addr, access)
    assert memory.written == written
    if first.fault is None:
        assert second.fault is None
        assert (first.gfn, first.level) == (second.gfn, second.level)
    else:
        assert second.fault is not None
        assert first.fault.error_code == second.fault.error_code
        assert not written


@given(modes, tables, registers, addresses)
def test_who_may_write_may_read(mode, table, regs, indices):
    for user in (0, PFERR_USER_MASK):
        memory, state = _guest(mode, table, regs)
        addr = _addr(mode, indices)
        written = walk_addr_generic(state, memory.spaces[0], addr, user | PFERR_WRITE_MASK)
        read = walk_addr_generic(state, memory.spaces[0], addr, user)
        if written.fault is None:
            assert read.fault is None
            assert read.gfn == written.gfn
            assert read.pte_access & 2 or (not user and not regs["cr0"])


@given(modes, tables, registers, addresses, st.sampled_from(ACCESSES))
def test_protections_only_ever_forbid(mode, table, regs, indices, access):
    memory, state = _guest(mode, table, regs)
    addr = _addr(mode, indices)
    if walk_addr_generic(state, memory.spaces[0], addr, access).fault is None:
        free = replace(state, cr0=state.cr0 & ~X86_CR0_WP, cr4=state.cr4 & ~(X86_CR4_SMEP | X86_CR4_SMAP))
        assert walk_addr_generic(free, memory.spaces[0], addr, access).fault is None


@given(modes, tables, registers, addresses, st.sampled_from(ACCESSES), st.integers(0, 4095))
def test_a_walk_sets_flags_and_nothing_else(mode, table, regs, indices, access, offset):
    memory, state = _guest(mode, table, regs)
    size = 4 if mode == "2-level" else 8
    walker = walk_addr_generic(state, memory.spaces[0], _addr(mode, indices) | offset, access)
    for pfn, page in memory.written.items():
        before = memory.pages[pfn]
        for at in range(0, 4096, size):
            old, new = (int.from_bytes(data[at : at + size], "little") for data in (before, page))
            if old != new:
                assert walker.fault is None
                assert new & ~old & ~0x60 == 0
                assert old & ~new == 0
                assert new & 1 << 5


# -- shadow paging -----------------------------------------------------------------------------

steps = st.lists(
    st.one_of(
        st.tuples(st.just("access"), addresses, st.sampled_from(ACCESSES)),
        st.tuples(st.just("store"), places, entries),
        st.tuples(st.just("native"), places, entries),
        st.tuples(st.just("cr3")),
        st.tuples(st.just("unprotect"), addresses),
    ),
    max_size=20,
)


def _native_write(mmu, mode, place, entry):
    """A write by the processor, through some mapping: possible only if no table is tracked there."""
    frame, index = place
    raw = _pack(mode, entry)
    gpa = (frame << 12) + index * len(raw)
    slot = mmu.slots.gfn_to_memslot(frame)
    if mmu.shadow.try_to_unsync_pages(slot, frame, can_unsync=True):
        mmu.slots.write_guest(gpa, raw)


@settings(max_examples=150)
@given(modes, tables, registers, steps)
def test_after_invlpg_hardware_finds_nothing_that_the_guest_did_not_map(mode, table, regs, program):
    memory, state = _guest(mode, table, regs)
    mmu = make_mmu(memory, state, ept=False)
    seen = []
    for step in program:
        if step[0] == "access":
            addr = _addr(mode, step[1])
            seen.append(addr)
            shadow_access(mmu, addr, step[2])
        elif step[0] == "store":
            (frame, index), raw = step[1], _pack(mode, step[2])
            mmu.slots.write_guest((frame << 12) + index * len(raw), raw)
            mmu.shadow.track_write((frame << 12) + index * len(raw), len(raw))
        elif step[0] == "native":
            _native_write(mmu, mode, step[1], step[2])
        elif step[0] == "cr3":
            mmu.new_pgd()
        else:
            for sp in mmu.shadow.indirect_pages(FRAMES.start + step[1][0]):
                mmu.shadow.zap(sp)
        _check_books(mmu)
    for addr in seen:
        mmu.invlpg(addr)
        for access in ACCESSES:
            if shadow_exit(mmu, addr, access) is None:
                walker = walk_addr_generic(mmu.vcpu, mmu.slots, addr, access)
                assert walker.fault is None, (hex(addr), access)
                assert mmu.get_spte(addr) >> 12 & 0xFFFFF == walker.gfn


def _check_books(mmu):
    """The reverse map, the lists by frame and the tracking say the same."""
    pages = [sp for found in mmu.shadow.by_gfn.values() for sp in found]
    leaves = {(gfn, sp, index) for sp in pages for index, (gfn, _) in sp.shadowed.items()}
    assert leaves == {(gfn, sp, index) for gfn, users in mmu.shadow.rmap.items() for sp, index in users}
    tracked = {sp.gfn for sp in pages if sp.role.level > 1 and not sp.role.direct}
    assert set(mmu.write_tracked) == tracked
    for sp in pages:
        assert not sp.invalid
        assert not sp.unsync or sp.role.level == 1
        assert all((sp, index) in child.parents for index, child in sp.children.items())
        for index, (gfn, _) in sp.shadowed.items():
            assert not (sp.spt[index] & 2 and gfn in tracked)
