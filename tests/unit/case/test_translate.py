"""Linear addresses through a case's own page tables: every kind of paging, every size of page."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch.cr import EFER_LMA, X86_CR0_PG, X86_CR4_LA57, X86_CR4_PAE, X86_CR4_PSE
from emufuzz.case.build import build_case
from emufuzz.case.model import (
    Memory,
    Outcome,
    case_memory,
    case_pages,
    code_parts,
    is_physical,
    memory_changes,
)
from emufuzz.case.translate import translate, walk

ROOT = 0x1000
PS = 0x80


def tables(size, *entries):
    """Pages with table entries at physical addresses."""
    return Memory(tuple((at, value.to_bytes(size, "little")) for at, value in entries)).pages


def long_tables(levels, linear, last, at_level=1):
    """One table per level at 0x1000, 0x2000 ..; the entry of `at_level` is `last`."""
    entries = []
    for depth, level in enumerate(range(levels, at_level - 1, -1)):
        index = linear >> 3 + 9 * level & 511
        value = last if level == at_level else ROOT + 0x1000 * (depth + 1) | 7
        entries.append((ROOT + 0x1000 * depth + index * 8, value))
    return tables(8, *entries)


LINEAR = 0x0000_7654_3210_9ABC
HIGH = 0xFFFF_8765_4321_0ABC


@pytest.mark.parametrize("linear", [LINEAR, HIGH])
@pytest.mark.parametrize(
    ("level", "last", "offset"),
    [(1, 0xABCDE007, 0xFFF), (2, 0x40000087, 0x1FFFFF), (3, 0x80000087, 0x3FFFFFFF)],
)
def test_four_levels_and_large_pages(linear, level, last, offset):
    pages = long_tables(4, linear, last, level)
    expected = last & ~offset & ~0xFFF | linear & offset
    assert translate(pages, X86_CR0_PG, ROOT, X86_CR4_PAE, EFER_LMA, linear) == expected


def test_five_levels():
    linear = 0x0012_3456_789A_BCDE
    pages = long_tables(5, linear, 0x5007)
    cr4 = X86_CR4_PAE | X86_CR4_LA57
    assert translate(pages, X86_CR0_PG, ROOT, cr4, EFER_LMA, linear) == 0x5CDE
    assert translate(pages, X86_CR0_PG, ROOT, X86_CR4_PAE, EFER_LMA, linear) is None  # not canonical


def test_flags_of_cr3_and_nx_are_no_address_bits():
    pages = long_tables(4, LINEAR, 0x8000_0000_0000_5007)
    assert translate(pages, X86_CR0_PG, ROOT | 0x18, X86_CR4_PAE, EFER_LMA, LINEAR) == 0x5ABC


@pytest.mark.parametrize(("pde", "expected"), [(0x3007, 0x5ABC), (0x00600087, 0x609ABC)])
def test_pae(pde, expected):
    linear = 0xC0009ABC
    pages = tables(8, (0x1020 + 3 * 8, 0x2001), (0x2000, pde), (0x3000 + 9 * 8, 0x5007))
    assert translate(pages, X86_CR0_PG, 0x1020, X86_CR4_PAE, 0, linear) == expected
    assert translate(pages, X86_CR0_PG, 0x1020, X86_CR4_PAE, 0, linear | 1 << 40) == expected
    assert translate(pages, X86_CR0_PG, 0x1020, X86_CR4_PAE, 0, 0x9ABC) is None


def test_two_levels():
    pages = tables(4, (0x1000 + 4, 0x2007), (0x2000 + 9 * 4, 0xFFFFF007))
    assert translate(pages, X86_CR0_PG, ROOT, 0, 0, 0x409ABC) == 0xFFFFFABC
    assert translate(pages, X86_CR0_PG, ROOT, 0, 0, 0x40AABC) is None


def test_large_pages_of_two_levels_need_pse_and_reach_beyond_4g():
    pages = tables(4, (0x1000 + 4, 0x00C02087), (0xC02000 + 9 * 4, 0x5007))
    assert translate(pages, X86_CR0_PG, ROOT, X86_CR4_PSE, 0, 0x409ABC) == 0x1_00C09ABC
    assert translate(pages, X86_CR0_PG, ROOT, 0, 0, 0x409ABC) == 0x5ABC


def test_without_paging_addresses_stay():
    assert translate({}, 0, ROOT, 0, 0, 0x12345) == 0x12345


def test_absent_tables_map_nothing():
    assert translate({}, X86_CR0_PG, ROOT, X86_CR4_PAE, EFER_LMA, LINEAR) is None


def test_the_entries_on_the_way_end_with_the_first_absent_one():
    pages = long_tables(4, LINEAR, 0x5006)
    entries, physical = walk(pages, X86_CR0_PG, ROOT, X86_CR4_PAE, EFER_LMA, LINEAR)
    assert (entries, physical) == ([0x2007, 0x3007, 0x4007, 0x5006], None)


def test_code_of_a_case_with_phys_lies_where_the_tables_put_it():
    """Its second page is elsewhere in physical memory."""
    case = build_case("prot64", bytes(range(1, 9)), rip=0x6FFC, physical=True)
    pages = case_memory(case).pages
    table = next(at for at in pages if int.from_bytes(pages[at][0x30:0x38], "little") >> 12 == 6)
    moved = {"addr": hex((table << 12) + 7 * 8), "data": (0x9000 | 0x67).to_bytes(8, "little").hex()}
    case = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], moved]})
    assert is_physical(case)
    assert code_parts(case) == [(0x6FFC, b"\1\2\3\4"), (0x9000, b"\5\6\7\x08")]
    assert case_pages(case)[9][:5] == b"\5\6\7\x08\0"
    outcome = Outcome("", case.gpr, case.rip, case.rflags, case.system, pages={9: bytes(4096)})
    assert memory_changes(case, outcome) == [(0x9000, bytes(4))]


def test_code_that_nothing_maps_is_not_laid():
    case = build_case("prot64", b"\x90", rip=0xB000, physical=True)
    assert code_parts(case) == []
    assert case_pages(case) == dict(case_memory(case).pages)
