"""Shadow page table entries: how KVM encodes what it maps, and what it knows to be MMIO.

KVM: spte.c and spte.h (make_spte, make_mmio_spte, kvm_mmu_set_ept_masks, kvm_mmu_reset_all_pte_masks;
Linux 6.12). SDM Vol. 3C 28.3.2 "EPT Translation Mechanism", 28.3.3.1 "EPT Misconfigurations".

The host is modelled with 4 KiB pages, EPT with accessed and dirty bits and execute-only entries,
no L1TF mitigation, memory encryption or access tracking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from emufuzz.kvm.mmu.pferr import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
)

VMX_EPT_READABLE_MASK: Final = 1 << 0
VMX_EPT_WRITABLE_MASK: Final = 1 << 1
VMX_EPT_EXECUTABLE_MASK: Final = 1 << 2
VMX_EPT_RWX_MASK: Final = 7
VMX_EPT_IPAT_BIT: Final = 1 << 6
VMX_EPT_ACCESS_BIT: Final = 1 << 8
VMX_EPT_DIRTY_BIT: Final = 1 << 9
VMX_EPT_SUPPRESS_VE_BIT: Final = 1 << 63
#: Writable and executable but not readable: hardware answers with an EPT misconfiguration.
VMX_EPT_MISCONFIG_WX_VALUE: Final = VMX_EPT_WRITABLE_MASK | VMX_EPT_EXECUTABLE_MASK

SPTE_MMU_PRESENT_MASK: Final = 1 << 11
#: An entry that maps nothing and, with EPT, raises no #VE.
SHADOW_NONPRESENT_VALUE: Final = 1 << 63

_MEMTYPE_WRBACK: Final = 6 << 3
_BASE_ADDR_MASK: Final = (1 << 52) - (1 << 12)

_GEN_LOW_BITS: Final = 8
_GEN_LOW_SHIFT: Final = 3
_GEN_LOW_MASK: Final = 0xFF << _GEN_LOW_SHIFT
_GEN_HIGH_MASK: Final = 0x7FF << 52
_GEN_HIGH_SHIFT: Final = 52 - _GEN_LOW_BITS
#: The 19 bits of the memslot generation that fit into an MMIO SPTE (bits 10:3 and 62:52).
MMIO_SPTE_GEN_MASK: Final = (1 << 19) - 1


@dataclass(frozen=True, slots=True)
class SpteMasks:
    """The shadow_*_mask variables: what each right looks like in an entry.

    `mmio_value` is 0 where no encoding of an entry is sure to fault, that is without EPT on a host
    with 52 address bits; MMIO is not cached then.
    """

    present: int
    user: int
    accessed: int
    dirty: int
    nx: int
    x: int
    memtype: int
    host_writable: int
    mmu_writable: int
    mmio_value: int
    mmio_mask: int
    mmio_access_mask: int
    mmio_gfn_mask: int

    def access(self, spte: int) -> int:
        """ACC_* rights of a present entry."""
        executable = spte & self.x if self.x else not spte & self.nx
        return (
            (ACC_EXEC_MASK if executable else 0)
            | (ACC_WRITE_MASK if spte & PT_WRITABLE_MASK else 0)
            | (ACC_USER_MASK if spte & self.user else 0)
        )

    def is_mmio_spte(self, spte: int) -> bool:
        """The entry says that there is no memory."""
        return bool(self.mmio_value) and spte & self.mmio_mask == self.mmio_value

    def get_mmio_spte_gfn(self, spte: int) -> int:
        """The frame in an MMIO SPTE."""
        return (spte & self.mmio_gfn_mask) >> 12

    def get_mmio_spte_access(self, spte: int) -> int:
        """The guest's rights in an MMIO SPTE."""
        return spte & self.mmio_access_mask

    def make_mmio_spte(self, generation: int, gfn: int, access: int) -> int:
        """An entry that makes the next access to a hole exit as MMIO at once."""
        gen = generation & MMIO_SPTE_GEN_MASK
        spte = gen << _GEN_LOW_SHIFT & _GEN_LOW_MASK | gen << _GEN_HIGH_SHIFT & _GEN_HIGH_MASK
        return spte | self.mmio_value | access & self.mmio_access_mask | gfn << 12

    def make_spte(self, pte_access: int, pfn: int, *, host_writable: bool, wrprot: bool) -> int:
        """A leaf entry for memory.

        Args:
            pte_access: ACC_* rights that the guest's tables give.
            pfn: Host frame.
            host_writable: The memslot is not read-only.
            wrprot: Writes must be seen by KVM, as the frame holds a table that it shadows.
        """
        spte = SPTE_MMU_PRESENT_MASK | self.present | self.accessed | self.memtype | pfn << 12
        spte |= self.x if pte_access & ACC_EXEC_MASK else self.nx
        if pte_access & ACC_USER_MASK:
            spte |= self.user
        if host_writable:
            spte |= self.host_writable
            if pte_access & ACC_WRITE_MASK and not wrprot:
                spte |= PT_WRITABLE_MASK | self.mmu_writable | self.dirty
        return spte


def get_mmio_spte_generation(spte: int) -> int:
    """The 19 bits of generation in an MMIO SPTE."""
    return (spte & _GEN_LOW_MASK) >> _GEN_LOW_SHIFT | (spte & _GEN_HIGH_MASK) >> _GEN_HIGH_SHIFT


def is_shadow_present_pte(spte: int) -> bool:
    """The entry maps memory."""
    return bool(spte & SPTE_MMU_PRESENT_MASK)


def spte_to_pfn(spte: int) -> int:
    """The host frame of a present entry."""
    return (spte & _BASE_ADDR_MASK) >> 12


def ept_masks(host_maxphyaddr: int) -> SpteMasks:
    """Entries of extended page tables (KVM: kvm_mmu_set_ept_masks)."""
    return SpteMasks(
        present=VMX_EPT_SUPPRESS_VE_BIT,
        user=VMX_EPT_READABLE_MASK,
        accessed=VMX_EPT_ACCESS_BIT,
        dirty=VMX_EPT_DIRTY_BIT,
        nx=0,
        x=VMX_EPT_EXECUTABLE_MASK,
        memtype=_MEMTYPE_WRBACK | VMX_EPT_IPAT_BIT,
        host_writable=1 << 57,
        mmu_writable=1 << 58,
        mmio_value=VMX_EPT_MISCONFIG_WX_VALUE,
        mmio_mask=VMX_EPT_RWX_MASK | VMX_EPT_SUPPRESS_VE_BIT,
        mmio_access_mask=0,
        mmio_gfn_mask=(1 << host_maxphyaddr) - (1 << 12),
    )


def shadow_masks(host_maxphyaddr: int) -> SpteMasks:
    """Entries of ordinary 64-bit tables (KVM: kvm_mmu_reset_all_pte_masks)."""
    mmio = 1 << 51 | PT_PRESENT_MASK if host_maxphyaddr < 52 else 0
    return SpteMasks(
        present=PT_PRESENT_MASK,
        user=PT_USER_MASK,
        accessed=PT_ACCESSED_MASK,
        dirty=PT_DIRTY_MASK,
        nx=PT64_NX_MASK,
        x=0,
        memtype=0,
        host_writable=1 << 9,
        mmu_writable=1 << 10,
        mmio_value=mmio,
        mmio_mask=mmio,
        mmio_access_mask=ACC_WRITE_MASK | ACC_USER_MASK,
        mmio_gfn_mask=(1 << host_maxphyaddr) - (1 << 12),
    )
