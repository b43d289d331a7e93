"""Translation for cases with flat linear memory, which have no page tables of their own.

This is not in KVM. Every linear address is its own guest physical address; a page exists if the
case has memory or a device there, and an access to any other page is a #PF without P, also with
paging off (docs/case-format.md). CR0.PG and CR3 count for nothing here.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_NX, X86_CR4_SMEP
from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.case.model import PAGE_SHIFT
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import KvmMemslots
from emufuzz.kvm.mmu.pferr import (
    ACC_ALL,
    INVALID_GPA,
    PFERR_FETCH_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from emufuzz.kvm.mmu.state import PagingState
from emufuzz.kvm.mmu.walker import GuestWalker

_REPORTED: Final = PFERR_WRITE_MASK | PFERR_USER_MASK


class NoAddressError(Exception):
    """A linear address cannot be its own physical one: KVM knows INVALID_GPA as no address at all."""


class HiddenTables:
    """Identity tables beside those that CR3 names; `devices` are page numbers of MMIO devices."""

    __slots__ = ("devices",)

    def __init__(self, devices: frozenset[int]) -> None:
        self.devices = devices

    def gpa(self, gva: int) -> int:
        """The physical address of a linear one whose page exists.

        Raises:
            NoAddressError: It is the last byte of 2^64, which no processor has as a physical address.
        """
        if gva == INVALID_GPA:
            raise NoAddressError("the last byte of the address space has no physical address in KVM")
        return gva

    def walk(self, state: PagingState, slots: KvmMemslots, addr: int, access: int) -> GuestWalker:
        """As `walker.walk_addr_generic`, for PFERR_* bits `access`; there are no tables on the way."""
        walker = GuestWalker()
        walker.level = 1
        gfn = walker.gfn = addr >> PAGE_SHIFT
        walker.pte_access = ACC_ALL
        if slots.gfn_to_memslot(gfn) is None and gfn not in self.devices:
            walker.fault = _absent(state, addr, access)
        return walker


def _absent(state: PagingState, addr: int, access: int) -> X86Exception:
    fault = X86Exception()
    fault.vector = PF_VECTOR
    fault.error_code_valid = True
    fault.error_code = access & _REPORTED
    if access & PFERR_FETCH_MASK and (state.efer & EFER_NX or state.cr4 & X86_CR4_SMEP):
        fault.error_code |= PFERR_FETCH_MASK
    fault.address = addr
    return fault
