"""Translation in each paging mode: levels, page sizes, reserved bits, PSE-36 (SDM Vol. 3A 4.3 to 4.5)."""

from __future__ import annotations

import pytest
from support.mmu import load_pdptrs
from support.page_tables import (
    ADDR,
    ALL,
    MODES,
    NX,
    PS,
    ROOT,
    TARGET,
    TOP,
    A,
    Chain,
    D,
    G,
    P,
    U,
    W,
    paging_state,
)

from emufuzz.arch.cr import EFER_NX, X86_CR4_PAE, X86_CR4_PSE
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import GuestMemory
from emufuzz.kvm.mmu.pferr import (
    INVALID_GPA,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from emufuzz.kvm.mmu.state import PlainPagingState
from emufuzz.kvm.mmu.walker import gva_to_gpa

RESERVED = PFERR_RSVD_MASK | PFERR_PRESENT_MASK
SIZES = [("2-level", 2), ("pae", 2), ("4-level", 2), ("4-level", 3), ("5-level", 2), ("5-level", 3)]


@pytest.mark.parametrize("mode", MODES)
def test_small_pages(mode):
    chain = Chain(mode)
    walker = chain.walk()
    assert walker.fault is None
    assert (walker.gfn, walker.level) == (TARGET, 1)
    assert gva_to_gpa(chain.state, chain.slots, ADDR, 0) == TARGET << 12 | 0x123


@pytest.mark.parametrize(("mode", "leaf"), SIZES)
def test_large_pages_take_the_offset_from_the_address(mode, leaf):
    chain = Chain(mode, leaf=leaf)
    walker = chain.walk()
    bits = chain.bits * (leaf - 1)
    assert walker.fault is None
    assert (walker.gfn, walker.level) == (TARGET & ~((1 << bits) - 1) | ADDR >> 12 & (1 << bits) - 1, leaf)


@pytest.mark.parametrize("mode", MODES)
def test_the_walker_knows_the_tables(mode):
    walker = Chain(mode).walk()
    top = 2 if mode == "pae" else TOP[mode]
    assert walker.max_level == top
    first = ROOT + (1 if mode == "pae" else 0)
    assert [walker.table_gfn[level] for level in range(top, 0, -1)] == list(range(first, first + top))
    assert all(walker.ptes[level] & P for level in range(1, top + 1))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("which", range(5))
def test_an_absent_entry_faults_without_p(mode, which):
    level = which + 1
    if level > TOP[mode]:
        level = 1
    chain = Chain(mode, {level: ALL & ~P})
    fault = chain.walk(PFERR_WRITE_MASK).fault
    assert fault is not None
    assert (fault.vector, fault.error_code_valid, fault.error_code) == (14, True, PFERR_WRITE_MASK)
    assert (fault.address, fault.nested_page_fault) == (ADDR, False)


@pytest.mark.parametrize("mode", MODES)
def test_a_table_outside_of_memory_is_not_present(mode):
    chain = Chain(mode)
    chain.memory.set_memory_region(0, 0, 0)
    assert chain.error() == 0


def test_a_table_in_a_slot_of_kvm_itself_is_not_present():
    chain = Chain("4-level")
    slot = chain.slots.slots[0]
    slot.id = 32764
    assert chain.error() == 0


def _reserved(mode, level, leaf, bit, **registers):
    flags = P if mode == "pae" and level == 3 else ALL
    return Chain(mode, {level: flags | 1 << bit}, leaf=leaf, efer=EFER_NX, **registers).error()


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
@pytest.mark.parametrize("maxphyaddr", [36, 40, 46, 52])
def test_address_bits_above_maxphyaddr_are_reserved_up_to_51(mode, maxphyaddr):
    for level in range(1, TOP[mode] + 1):
        for bit in range(36, 63):
            expected = RESERVED if maxphyaddr <= bit < 52 else None
            if expected is None and level > 1 and bit < 52:
                continue  # a table beyond memory
            assert _reserved(mode, level, 1, bit, maxphyaddr=maxphyaddr) == expected, (level, bit)


@pytest.mark.parametrize("maxphyaddr", [36, 40, 52])
def test_pae_reserves_up_to_bit_62(maxphyaddr):
    for level in (1, 2):
        for bit in range(maxphyaddr, 63):
            assert _reserved("pae", level, 1, bit, maxphyaddr=maxphyaddr) == RESERVED, (level, bit)


@pytest.mark.parametrize("mode", ["pae", "4-level", "5-level"])
def test_bit_63_is_reserved_without_nxe(mode):
    for level in range(1, 3 if mode == "pae" else TOP[mode] + 1):
        assert Chain(mode, {level: ALL | NX}).error() == RESERVED
        assert Chain(mode, {level: ALL | NX}, efer=EFER_NX).error() is None


@pytest.mark.parametrize(("mode", "level"), [("4-level", 4), ("5-level", 5), ("5-level", 4)])
def test_bit_7_is_reserved_at_the_top(mode, level):
    assert Chain(mode, {level: ALL | PS}).error() == RESERVED


@pytest.mark.parametrize("level", [4, 5])
def test_bit_8_is_reserved_at_the_top_for_amd_only(level):
    assert Chain("5-level", {level: ALL | G}).error() is None
    chain = Chain("5-level", {level: ALL | G})
    chain.state.amd_compatible = True
    assert chain.error() == RESERVED


@pytest.mark.parametrize("mode", ["4-level", "5-level"])
def test_gigabyte_pages_need_cpuid(mode):
    chain = Chain(mode, leaf=3)
    assert chain.error() is None
    chain.state.has_gbpages = False
    assert chain.error() == RESERVED


@pytest.mark.parametrize(
    ("mode", "leaf", "bits"),
    [
        ("4-level", 3, range(13, 30)),
        ("4-level", 2, range(13, 21)),
        ("5-level", 3, range(13, 30)),
        ("pae", 2, range(13, 21)),
    ],
)
def test_low_address_bits_of_large_pages_are_reserved_but_pat(mode, leaf, bits):
    for bit in bits:
        assert _reserved(mode, leaf, leaf, bit) == RESERVED, bit
    assert _reserved(mode, leaf, leaf, 12) is None


def test_pse36_bits_are_address_bits_32_to_35():
    for bit in range(13, 17):
        walker = Chain("2-level", {2: ALL | 1 << bit}, leaf=2).walk()
        assert walker.fault is None
        assert walker.gfn == (TARGET & ~0x3FF | ADDR >> 12 & 0x3FF) + (1 << bit - 13 + 20)
    for bit in range(17, 22):
        assert Chain("2-level", {2: ALL | 1 << bit}, leaf=2).error() == RESERVED


def test_page_size_bit_is_ignored_without_pse():
    chain = Chain("2-level", {2: ALL | PS | 0})
    chain.state.cr4 &= ~X86_CR4_PSE
    walker = chain.walk()
    assert walker.fault is None
    assert (walker.level, walker.gfn) == (1, TARGET)


def test_two_level_small_entries_have_no_reserved_bits():
    flags = ALL | 0xF98
    assert Chain("2-level", {1: flags, 2: flags & ~PS}).error() is None


@pytest.mark.parametrize("bit", [1, 2, 5, 6, 7, 8, 40, 51, 52, 62, 63])
def test_load_pdptrs_refuses_reserved_bits_of_present_entries(bit):
    for present in (0, P):
        raw = (present | 1 << bit).to_bytes(8, "little") + bytes(24)
        memory = GuestMemory({ROOT: bytes(0x40) + raw + bytes(4096 - 0x60)})
        memory.set_memory_region(0, ROOT, 1)
        loaded = load_pdptrs(memory.spaces[0], ROOT << 12 | 0x5F, 40)
        assert loaded == (None if present else (1 << bit, 0, 0, 0))


def test_load_pdptrs_needs_memory():
    assert load_pdptrs(GuestMemory({}).spaces[0], 0x1000, 40) is None


def test_pae_uses_the_cached_pdptrs_not_memory():
    chain = Chain("pae")
    chain.slots.write_guest(ROOT << 12, bytes(32))
    assert chain.error() is None
    chain.state.pdptrs = [0] * 4
    assert chain.error(PFERR_WRITE_MASK) == PFERR_WRITE_MASK


def test_no_paging_translates_nothing_and_never_faults():
    exception = X86Exception()
    exception.error_code = 5
    slots = GuestMemory({}).spaces[0]
    state = PlainPagingState(current_cpl=3)
    assert gva_to_gpa(state, slots, 0x1_2345_6789, PFERR_WRITE_MASK, exception) == 0x1_2345_6789
    assert (exception.error_code, exception.vector) == (0, 0xFF)


def test_upper_bits_of_the_address_are_ignored():
    for mode, bit in (("pae", 32), ("2-level", 32), ("4-level", 48), ("5-level", 57)):
        chain = Chain(mode)
        chain.addr |= 1 << bit
        assert chain.walk().gfn == TARGET


def test_long_mode_without_pae_faults():
    chain = Chain("4-level")
    chain.state.cr4 &= ~X86_CR4_PAE
    assert chain.error() == 0


def test_translation_for_each_kind_of_access():
    chain = Chain("4-level", {1: P | A | D})
    exception = X86Exception()
    state, slots = chain.state, chain.slots
    user = PFERR_USER_MASK
    assert gva_to_gpa(state, slots, ADDR, 0) == TARGET << 12 | 0x123
    assert gva_to_gpa(state, slots, ADDR, user, exception) == INVALID_GPA
    assert (exception.vector, exception.error_code, exception.address) == (14, 5, ADDR)
    assert gva_to_gpa(state, slots, ADDR, user | PFERR_WRITE_MASK, exception) == INVALID_GPA
    assert exception.error_code == 7
    state.efer |= EFER_NX
    assert gva_to_gpa(state, slots, ADDR, user | PFERR_FETCH_MASK, exception) == INVALID_GPA
    assert exception.error_code == 0x15


def test_rights_of_all_levels_are_combined():
    walker = Chain("4-level", {4: ALL & ~W, 3: ALL & ~U, 2: ALL | NX}, efer=EFER_NX).walk()
    assert walker.pte_access == 0
    assert [walker.pt_access[level] for level in (4, 3, 2, 1)] == [7, 5, 1, 0]


def test_pe_without_pg_is_no_paging():
    state = paging_state("4-level")
    state.cr0 &= 0x7FFFFFFF
    assert gva_to_gpa(state, GuestMemory({}).spaces[0], ADDR, 0) == ADDR
