"""The guest page walk: linear address to guest physical address, with faults and A/D updates.

KVM: paging_tmpl.h (walk_addr_generic, update_accessed_dirty_bits, gva_to_gpa) for 32-bit and 64-bit
entries, permission_fault of mmu.h, nonpaging_gva_to_gpa (Linux 6.12). SDM Vol. 3A 4.3 "32-Bit
Paging" to 4.8 "Accessed and Dirty Flags".

Bits of the address above those that the mode translates are ignored; whether an address is
canonical is the caller's business.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.case.model import PAGE_MASK
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import KVM_MEM_READONLY, KvmMemslots, MemorySlot, kvm_is_visible_memslot
from emufuzz.kvm.mmu.paging import PT32E_ROOT_LEVEL, GuestPaging, guest_paging
from emufuzz.kvm.mmu.pferr import (
    ACC_WRITE_MASK,
    INVALID_GPA,
    PFERR_FETCH_MASK,
    PFERR_IMPLICIT_ACCESS,
    PFERR_PK_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
)
from emufuzz.kvm.mmu.state import PagingState

_MASK64: Final = (1 << 64) - 1
_U32: Final = Struct("<I")
_U64: Final = Struct("<Q")
_BASE_ADDR_MASK: Final = (1 << 52) - (1 << 12)
_BASE_ADDR_MASK32: Final = (1 << 32) - (1 << 12)
_RIGHTS: Final = 7
_ACCESS_BITS: Final = PFERR_WRITE_MASK | PFERR_USER_MASK | PFERR_FETCH_MASK
_PSE36_MASK: Final = 0xF << 13
_PSE36_SHIFT: Final = 32 - 13 - 12  # bits 16:13 of the entry are bits 35:32 of the address


class GuestWalker:
    """struct guest_walker: what a walk found. Lists are indexed by level, 1 = last.

    Attributes:
        level: Level of the entry that maps the page: 1 = 4 KiB, 2 = 2 or 4 MiB, 3 = 1 GiB; if the
            walk failed, that of the last entry looked at.
        max_level: Level of the first entry read from memory.
        table_gfn: Guest frames of the tables.
        ptes: The entries, with the accessed and dirty bits that the walk set.
        slots: The memslots of the tables.
        pt_access: ACC_* of all entries above this level together.
        pte_access: ACC_* of the translation; no ACC_WRITE_MASK on a read while the page is clean.
        gfn: Guest frame that the address translates to.
        fault: The #PF if the walk failed, else None.
    """

    __slots__ = (
        "fault", "gfn", "level", "max_level", "pt_access", "pte_access", "pte_gpa", "ptes", "slots",
        "table_gfn",
    )  # fmt: skip

    def __init__(self) -> None:
        self.level = self.max_level = 0
        self.table_gfn = [0] * 6
        self.ptes = [0] * 6
        self.pte_gpa = [0] * 6
        self.slots: list[MemorySlot | None] = [None] * 6
        self.pt_access = [0] * 6
        self.pte_access = 0
        self.gfn = 0
        self.fault: X86Exception | None = None


def permission_fault(
    state: PagingState, paging: GuestPaging, pte_access: int, pte_pkey: int, access: int
) -> int:
    """Error code bits (P and maybe PK) if `access` violates ACC_* rights, else 0.

    Args:
        state: Gives RFLAGS.AC and PKRU.
        paging: The paging mode.
        pte_access: ACC_* rights of the translation.
        pte_pkey: Protection key of the page, 0..15.
        access: PFERR_WRITE/USER/FETCH_MASK and PFERR_IMPLICIT_ACCESS.
    """
    index = access & _ACCESS_BITS
    if state.rflags & X86_EFLAGS_AC and not access & PFERR_IMPLICIT_ACCESS:
        index |= PFERR_RSVD_MASK  # SMAP does not apply
    fault = paging.permissions[index >> 1] >> pte_access & 1
    if paging.pkru_mask:
        offset = access & _ACCESS_BITS | (PFERR_RSVD_MASK if pte_access & PT_USER_MASK else 0)
        if state.pkru >> pte_pkey * 2 & paging.pkru_mask >> offset & 3:
            return PFERR_PRESENT_MASK | PFERR_PK_MASK
    return PFERR_PRESENT_MASK if fault else 0


def _root(walker: GuestWalker, state: PagingState, paging: GuestPaging, addr: int) -> int:
    """The entry that points to the first table in memory; 0 if a PDPTE is not present."""
    walker.level = walker.max_level = paging.level
    if paging.level != PT32E_ROOT_LEVEL:
        return state.cr3 | PT_PRESENT_MASK
    walker.level = walker.max_level = PT32E_ROOT_LEVEL - 1
    pdpte = state.pdptrs[addr >> 30 & 3]
    return pdpte if pdpte & PT_PRESENT_MASK else 0


def _walk64(walker: GuestWalker, paging: GuestPaging, slots: KvmMemslots, addr: int, pte: int) -> int:
    """Walk 8-byte entries from `pte`; returns the AND of all entries (NX inverted), or -error code - 1."""
    level = walker.level + 1
    access = _MASK64
    rsvd = paging.rsvd
    while True:
        level -= 1
        gfn = (pte & _BASE_ADDR_MASK) >> 12
        offset = (addr >> 9 * level + 3 & 511) * 8
        walker.level = level
        walker.table_gfn[level] = gfn
        walker.pte_gpa[level] = gfn << 12 | offset
        slot = slots.gfn_to_memslot(gfn)
        if slot is None or not kvm_is_visible_memslot(slot):
            return -1
        pte = _U64.unpack_from(slots.page(slot, gfn), offset)[0]
        if not pte & PT_PRESENT_MASK:
            return -1
        if pte & rsvd[pte >> 7 & 1][level]:
            return -1 - (PFERR_RSVD_MASK | PFERR_PRESENT_MASK)
        walker.slots[level] = slot
        walker.ptes[level] = pte
        walker.pt_access[level] = (access & _RIGHTS) ^ ((access ^ PT64_NX_MASK) >> 63)
        access &= pte ^ PT64_NX_MASK
        if level == 1 or pte & PT_PAGE_SIZE_MASK:
            return access


def _walk32(walker: GuestWalker, paging: GuestPaging, slots: KvmMemslots, addr: int, pte: int) -> int:
    """As `_walk64` for 4-byte entries, which have no NX bit: every page is executable."""
    level = walker.level + 1
    access = _MASK64
    while True:
        level -= 1
        gfn = (pte & _BASE_ADDR_MASK32) >> 12
        offset = (addr >> 10 * level + 2 & 1023) * 4
        walker.level = level
        walker.table_gfn[level] = gfn
        walker.pte_gpa[level] = gfn << 12 | offset
        slot = slots.gfn_to_memslot(gfn)
        if slot is None or not kvm_is_visible_memslot(slot):
            return -1
        pte = _U32.unpack_from(slots.page(slot, gfn), offset)[0]
        if not pte & PT_PRESENT_MASK:
            return -1
        # Bit 7 of a directory entry is ignored, not reserved, without CR4.PSE.
        if pte & paging.rsvd[pte >> 7 & 1][level]:
            return -1 - (PFERR_RSVD_MASK | PFERR_PRESENT_MASK)
        walker.slots[level] = slot
        walker.ptes[level] = pte
        walker.pt_access[level] = access & _RIGHTS
        access &= pte | PT64_NX_MASK
        if level == 1 or (pte & PT_PAGE_SIZE_MASK and paging.pse):
            return access


def walk_addr_generic(state: PagingState, slots: KvmMemslots, addr: int, access: int) -> GuestWalker:
    """Walk the guest's tables for one access (KVM: FNAME(walk_addr_generic)).

    Args:
        state: The vCPU's paging state; paging must be on.
        slots: Guest physical memory; accessed and dirty bits are written to it.
        addr: Linear address.
        access: PFERR_WRITE_MASK, PFERR_USER_MASK, PFERR_FETCH_MASK, PFERR_IMPLICIT_ACCESS.

    Returns:
        What was found; `fault` is set if the access faults. A table outside of visible memslots
        faults like an entry that is not present.
    """
    paging = guest_paging(state)
    walker = GuestWalker()
    walk = _walk32 if paging.has_4_byte_gpte else _walk64
    while True:
        root = _root(walker, state, paging, addr)
        if root and not paging.bugged:
            rights = walk(walker, paging, slots, addr, root)
        else:
            walker.level += 1  # no entry was looked at
            rights = -1
        if rights < 0:
            return _fault(walker, paging, addr, access, -1 - rights)
        pte = walker.ptes[walker.level]
        pte_access = (rights & _RIGHTS) ^ ((rights ^ PT64_NX_MASK) >> 63)
        pkey = pte >> 59 & 0xF
        error = permission_fault(state, paging, pte_access, pkey, access)
        if error:
            return _fault(walker, paging, addr, access, error)
        walker.gfn = _leaf_gfn(walker.level, paging, addr, pte)
        done = rights & PT_ACCESSED_MASK
        if access & PFERR_WRITE_MASK:
            done &= pte >> 1  # dirty too
        elif not pte & PT_DIRTY_MASK:
            pte_access &= ~ACC_WRITE_MASK
        walker.pte_access = pte_access
        if done or update_accessed_dirty_bits(walker, paging, slots, access):
            return walker


def _leaf_gfn(level: int, paging: GuestPaging, addr: int, pte: int) -> int:
    if level == 1:
        return (pte & (_BASE_ADDR_MASK32 if paging.has_4_byte_gpte else _BASE_ADDR_MASK)) >> 12
    if paging.has_4_byte_gpte:
        return (pte & 0xFFC00000) >> 12 | addr >> 12 & 0x3FF | (pte & _PSE36_MASK) << _PSE36_SHIFT
    inside = (1 << 9 * (level - 1)) - 1
    return (pte & _BASE_ADDR_MASK) >> 12 & ~inside | addr >> 12 & inside


def _fault(walker: GuestWalker, paging: GuestPaging, addr: int, access: int, error: int) -> GuestWalker:
    error |= access & (PFERR_WRITE_MASK | PFERR_USER_MASK)
    if access & PFERR_FETCH_MASK and paging.reports_fetch:
        error |= PFERR_FETCH_MASK
    fault = walker.fault = X86Exception()
    fault.vector = PF_VECTOR
    fault.error_code_valid = True
    fault.error_code = error
    fault.address = addr
    return walker


def update_accessed_dirty_bits(
    walker: GuestWalker, paging: GuestPaging, slots: KvmMemslots, access: int
) -> bool:
    """Set A in every entry of the walk, and D in the last one on a write; False: walk again.

    Each entry is exchanged only if it still has the value that the walk read. It may not have it
    when one entry serves at two levels of a recursive table. A table in read-only memory keeps its
    bits and the access goes on.
    """
    entry = _U32 if paging.has_4_byte_gpte else _U64
    for level in range(walker.max_level, walker.level - 1, -1):
        old = walker.ptes[level]
        pte = old | PT_ACCESSED_MASK
        if level == walker.level and access & PFERR_WRITE_MASK:
            pte |= PT_DIRTY_MASK
        slot = walker.slots[level]
        if pte == old or slot is None or slot.flags & KVM_MEM_READONLY:
            continue
        if not slots.cmpxchg(slot, walker.pte_gpa[level], entry.pack(old), entry.pack(pte)):
            return False
        walker.ptes[level] = pte
    return True


def gva_to_gpa(
    state: PagingState, slots: KvmMemslots, addr: int, access: int, exception: X86Exception | None = None
) -> int:
    """Translate a linear address, or INVALID_GPA with the #PF in `exception`.

    KVM: mmu->gva_to_gpa. Without paging the address is returned as it is and never faults.
    """
    if not state.cr0 >> 31 & 1:
        if exception is not None:
            exception.error_code = 0
        return addr
    walker = walk_addr_generic(state, slots, addr, access)
    fault = walker.fault
    if fault is None:
        return walker.gfn << 12 | addr & PAGE_MASK
    if exception is not None:
        copy_fault(fault, exception)
    return INVALID_GPA


def copy_fault(source: X86Exception, target: X86Exception) -> None:
    """Hand a page fault over to the caller's exception."""
    target.vector = source.vector
    target.error_code_valid = source.error_code_valid
    target.error_code = source.error_code
    target.address = source.address
    target.nested_page_fault = source.nested_page_fault
    target.exit_qualification = source.exit_qualification
