"""What a combination of control bits means for the guest walker, computed once per combination.

KVM: kvm_calc_cpu_role, reset_guest_rsvds_bits_mask, update_permission_bitmask and
update_pkru_bitmask of mmu.c (Linux 6.12), which fill struct kvm_mmu. SDM Vol. 3A 4.1, 4.6, 4.7.
"""

from __future__ import annotations

from functools import lru_cache
from struct import Struct
from typing import Final, TypeAlias

from emufuzz.arch.cr import (
    EFER_LMA,
    EFER_NX,
    X86_CR0_PG,
    X86_CR0_WP,
    X86_CR4_LA57,
    X86_CR4_PAE,
    X86_CR4_PSE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
)
from emufuzz.kvm.mmu.pferr import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PFERR_FETCH_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    PT_PRESENT_MASK,
)
from emufuzz.kvm.mmu.state import PagingState

X86_CR4_PKE: Final = 1 << 22

PT32_ROOT_LEVEL: Final = 2
_PDPTES: Final = Struct("<4Q")

PT32E_ROOT_LEVEL: Final = 3
PT64_ROOT_4LEVEL: Final = 4
PT64_ROOT_5LEVEL: Final = 5

_CR0_BITS: Final = X86_CR0_PG | X86_CR0_WP
_CR4_BITS: Final = X86_CR4_PSE | X86_CR4_PAE | X86_CR4_LA57 | X86_CR4_SMEP | X86_CR4_SMAP | X86_CR4_PKE
_EFER_BITS: Final = EFER_LMA | EFER_NX

#: Reserved bits by bit 7 of the entry, then by level (index 0 unused).
ReservedBits: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]


def rsvd_bits(low: int, high: int) -> int:
    """A mask of bits `low` to `high`, both included; 0 if `high` is below `low`."""
    return (1 << high + 1) - (1 << low) if high >= low else 0


class GuestPaging:
    """The part of struct kvm_mmu that derives from control bits and CPUID.

    Attributes:
        level: Levels of the walk from the root, 0 without paging. PAE paging has 3, of which the
            first is cached in the PDPTRs.
        has_4_byte_gpte: 32-bit paging.
        pse: 4 MiB pages of 32-bit paging.
        rsvd: Reserved bits of the guest's entries.
        permissions: By error code >> 1 (RSVD standing for "SMAP does not apply"): a bit per
            access right that faults.
        pkru_mask: By error code without P, RSVD standing for "user page": PKRU bits that count;
            two bits each. 0 without protection keys.
        reports_fetch: Error codes tell that an access was a fetch.
        bugged: Long mode without CR4.PAE, which no guest can reach: every walk fails.
    """

    __slots__ = (
        "bugged", "has_4_byte_gpte", "level", "permissions", "pkru_mask", "pse", "reports_fetch", "role",
        "rsvd", "smep", "wp",
    )  # fmt: skip

    def __init__(self, cr0: int, cr4: int, efer: int, maxphyaddr: int, gbpages: bool, amd: bool) -> None:
        paging, long_mode, pae = bool(cr0 & X86_CR0_PG), bool(efer & EFER_LMA), bool(cr4 & X86_CR4_PAE)
        nx = bool(efer & EFER_NX)
        self.wp = bool(cr0 & X86_CR0_WP)
        self.smep = bool(cr4 & X86_CR4_SMEP)
        self.pse = bool(cr4 & X86_CR4_PSE)
        self.bugged = paging and long_mode and not pae
        self.has_4_byte_gpte = paging and not pae
        self.level = self._root_level(paging, long_mode and pae, pae, bool(cr4 & X86_CR4_LA57))
        # KVM deviation: with 32-bit paging EFER.NXE alone does not make hardware report a fetch
        # (SDM Vol. 3A 4.7 asks for CR4.PAE too).
        self.reports_fetch = nx or self.smep
        self.rsvd = guest_rsvd_bits(self.level, rsvd_bits(maxphyaddr, 63), nx, gbpages, self.pse, amd)
        self.permissions = permission_bitmask(self.wp, nx, self.smep, bool(cr4 & X86_CR4_SMAP))
        keys = bool(cr4 & X86_CR4_PKE) and long_mode and pae
        self.pkru_mask = pkru_bitmask(self.wp) if keys else 0
        # what tells shadow pages apart (union kvm_mmu_page_role without level, access and quadrant)
        smap = bool(cr4 & X86_CR4_SMAP)
        self.role = (self.has_4_byte_gpte, nx, self.wp, self.smep and not self.wp, smap and not self.wp)

    @staticmethod
    def _root_level(paging: bool, long_mode: bool, pae: bool, la57: bool) -> int:
        if not paging:
            return 0
        if long_mode:
            return PT64_ROOT_5LEVEL if la57 else PT64_ROOT_4LEVEL
        return PT32E_ROOT_LEVEL if pae else PT32_ROOT_LEVEL


@lru_cache(maxsize=4096)
def _guest_paging(cr0: int, cr4: int, efer: int, maxphyaddr: int, gbpages: bool, amd: bool) -> GuestPaging:
    return GuestPaging(cr0, cr4, efer, maxphyaddr, gbpages, amd)


def guest_paging(state: PagingState) -> GuestPaging:
    """The paging mode of a vCPU at this moment.

    KVM keeps it in the vCPU and refreshes it when a control register changes (of CR0.WP, which the
    guest may own under EPT, at each use); the result is the same.
    """
    return _guest_paging(
        state.cr0 & _CR0_BITS,
        state.cr4 & _CR4_BITS,
        state.efer & _EFER_BITS,
        state.maxphyaddr,
        state.has_gbpages,
        state.amd_compatible,
    )


def guest_rsvd_bits(
    level: int, pa_bits_rsvd: int, nx: bool, gbpages: bool, pse: bool, amd: bool
) -> ReservedBits:
    """Reserved bits of guest entries (KVM: __reset_rsvds_bits_mask; SDM Vol. 3A tables 4-5 to 4-20)."""
    if level <= PT32_ROOT_LEVEL:
        # KVM deviation: PSE-36 always has 36 address bits; with MAXPHYADDR above 36 the SDM has as
        # many as there are, up to 40 (Vol. 3A Table 4-4).
        return (0, 0, 0), (0, 0, rsvd_bits(17, 21) if pse else 0)
    no_nx = 0 if nx else rsvd_bits(63, 63)
    if level == PT32E_ROOT_LEVEL:
        high = pa_bits_rsvd & rsvd_bits(0, 62) | no_nx
        return (0, high, high), (0, high, high | rsvd_bits(13, 20))
    high = pa_bits_rsvd & rsvd_bits(0, 51) | no_nx
    # APM Vol. 2 5.3.3: bit 8 must be zero in upper entries, where it has no meaning for Intel.
    root = high | rsvd_bits(7, 7) | (rsvd_bits(8, 8) if amd else 0)
    third = high if gbpages else high | rsvd_bits(7, 7)
    small = (0, high, high, third, root, root)
    large = (0, high, high | rsvd_bits(13, 20), third | rsvd_bits(13, 29), root, root)
    return small, large


def pdptr_rsvd_bits(maxphyaddr: int) -> int:
    """Reserved bits of a present PDPTE of PAE paging (KVM: pdptr_rsvd_bits; SDM Vol. 3A Table 4-8)."""
    return rsvd_bits(maxphyaddr, 63) | rsvd_bits(5, 8) | rsvd_bits(1, 2)


def _faulting_rights(mask: int, *, when_set: bool) -> int:
    """A bit for each of the eight access rights in which `mask` is set, or clear."""
    return sum(1 << access for access in range(8) if bool(access & mask) == when_set)


_NOT_WRITABLE: Final = _faulting_rights(ACC_WRITE_MASK, when_set=False)
_NOT_USER: Final = _faulting_rights(ACC_USER_MASK, when_set=False)
_NOT_EXECUTABLE: Final = _faulting_rights(ACC_EXEC_MASK, when_set=False)
_USER: Final = _faulting_rights(ACC_USER_MASK, when_set=True)


def permission_bitmask(wp: bool, nx: bool, smep: bool, smap: bool) -> tuple[int, ...]:
    """kvm_mmu.permissions: which access rights fault, by error code >> 1 (SDM Vol. 3A 4.6.1)."""
    return tuple(_permission_byte(index << 1, wp, nx, smep, smap) for index in range(16))


def _permission_byte(pfec: int, wp: bool, nx: bool, smep: bool, smap: bool) -> int:
    user, fetch = pfec & PFERR_USER_MASK, pfec & PFERR_FETCH_MASK
    faults = 0
    if pfec & PFERR_WRITE_MASK and (wp or user):
        faults |= _NOT_WRITABLE
    if user:
        faults |= _NOT_USER
    if fetch and nx:
        faults |= _NOT_EXECUTABLE
    if fetch and smep and not user:
        faults |= _USER
    if smap and not user and not pfec & (PFERR_RSVD_MASK | PFERR_FETCH_MASK):
        faults |= _USER
    return faults


def pkru_bitmask(wp: bool) -> int:
    """kvm_mmu.pkru_mask (SDM Vol. 3A 4.6.2 "Protection Keys").

    Bit 0 of each pair stands for PKRU.AD, bit 1 for PKRU.WD. Keys guard data accesses to user
    pages; write-disable spares the supervisor while CR0.WP is clear.
    """
    mask = 0
    for index in range(16):
        pfec = index << 1
        if pfec & PFERR_FETCH_MASK or not pfec & PFERR_RSVD_MASK:
            continue
        write = pfec & PFERR_WRITE_MASK and (pfec & PFERR_USER_MASK or wp)
        mask |= (3 if write else 1) << pfec
    return mask


def valid_pdptes(data: bytes, maxphyaddr: int) -> tuple[int, ...] | None:
    """The four PDPTEs in 32 bytes; None, for #GP, if a present one has reserved bits (SDM Vol. 3A 4.4.1)."""
    entries: tuple[int, ...] = _PDPTES.unpack(data)
    reserved = pdptr_rsvd_bits(maxphyaddr)
    if any(entry & PT_PRESENT_MASK and entry & reserved for entry in entries):
        return None
    return entries
