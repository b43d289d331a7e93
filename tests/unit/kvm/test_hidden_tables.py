"""Flat cases: every address is its own, present where the case has memory or a device."""

from __future__ import annotations

import pytest

from emufuzz.arch.cr import EFER_NX, X86_CR0_PG, X86_CR4_SMEP
from emufuzz.kvm.memslots import memory_from_pages
from emufuzz.kvm.mmu.hidden import HiddenTables, NoAddressError
from emufuzz.kvm.mmu.state import PlainPagingState

P, W, U, F, IMPLICIT = 1, 2, 4, 16, 1 << 48
TABLES = HiddenTables(frozenset({0xB}))
SLOTS = memory_from_pages({0x8: bytes(4096)}).spaces[0]


@pytest.mark.parametrize("addr", [0x8000, 0x8FFF, 0xB000])
@pytest.mark.parametrize("access", [0, W, W | U, F | U, IMPLICIT])
@pytest.mark.parametrize("cr0", [0, X86_CR0_PG])
def test_memory_and_devices_are_mapped_with_all_rights(addr: int, access: int, cr0: int) -> None:
    walker = TABLES.walk(PlainPagingState(cr0=cr0), SLOTS, addr, access)
    assert walker.fault is None
    assert (walker.gfn, walker.level, walker.pte_access) == (addr >> 12, 1, 7)


@pytest.mark.parametrize(
    ("access", "efer", "cr4", "code"),
    [
        (0, 0, 0, 0),
        (W, 0, 0, W),
        (W | U, 0, 0, W | U),
        (IMPLICIT, 0, 0, 0),
        (F, 0, 0, 0),
        (F | U, EFER_NX, 0, F | U),
        (F, 0, X86_CR4_SMEP, F),
    ],
)
def test_everything_else_is_absent(access: int, efer: int, cr4: int, code: int) -> None:
    fault = TABLES.walk(PlainPagingState(efer=efer, cr4=cr4), SLOTS, 0x9123, access).fault
    assert fault is not None
    assert (fault.vector, fault.error_code_valid, fault.error_code, fault.address) == (14, True, code, 0x9123)


def test_an_address_is_its_own_but_for_the_last_one() -> None:
    assert TABLES.gpa(0xFFFF_8000_0000_8123) == 0xFFFF_8000_0000_8123
    with pytest.raises(NoAddressError, match="last byte of the address space"):
        TABLES.gpa((1 << 64) - 1)
