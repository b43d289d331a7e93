"""The vCPU's memory of its last MMIO access, which spares the walk of the guest's tables.

KVM: vcpu_cache_mmio_info and its companions of x86.h, vcpu_mmio_gva_to_gpa and vcpu_is_mmio_gpa of
x86.c, handle_mmio_page_fault of mmu.c (Linux 6.12).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.arch.cr import X86_CR0_PG
from emufuzz.case.model import PAGE_MASK
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS
from emufuzz.kvm.mmu.paging import guest_paging
from emufuzz.kvm.mmu.pferr import (
    INVALID_GPA,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    RET_PF_EMULATE,
    RET_PF_INVALID,
    RET_PF_RETRY,
)
from emufuzz.kvm.mmu.spte import MMIO_SPTE_GEN_MASK, get_mmio_spte_generation
from emufuzz.kvm.mmu.walker import permission_fault

if TYPE_CHECKING:
    from emufuzz.kvm.mmu.mmu import KvmMmu

APIC_DEFAULT_PHYS_BASE: Final = 0xFEE00000
_PAGE: Final = (1 << 64) - 1 - PAGE_MASK


class MmioCache:
    """vcpu->arch.mmio_gva, mmio_gfn, mmio_access, mmio_gen. `gva` 0 and `gfn` 0 never match."""

    __slots__ = ("access", "gen", "gfn", "gva")

    def __init__(self) -> None:
        self.gva = 0
        self.gfn = 0
        self.access = 0
        self.gen = 0

    def store(self, generation: int, gva: int, gfn: int, access: int) -> None:
        """Remember an access (KVM: vcpu_cache_mmio_info), unless memslots are just changing."""
        if generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
            return
        self.gva = gva & _PAGE
        self.access = access
        self.gfn = gfn
        self.gen = generation

    def clear(self, gva: int | None = None) -> None:
        """Forget the linear address, all or only `gva`'s page (KVM: vcpu_clear_mmio_info).

        The physical address stays valid until the memslots change.
        """
        if gva is None or self.gva == gva & _PAGE:
            self.gva = 0

    def match_gva(self, generation: int, gva: int) -> bool:
        """KVM: vcpu_match_mmio_gva."""
        return self.gen == generation and self.gva != 0 and self.gva == gva & _PAGE

    def match_gpa(self, generation: int, gpa: int) -> bool:
        """KVM: vcpu_match_mmio_gpa."""
        return self.gen == generation and self.gfn != 0 and self.gfn == gpa >> 12


def mmio_info_in_cache(mmu: KvmMmu, addr: int, *, direct: bool) -> bool:
    """The faulting address is that of the last MMIO access: a GPA if `direct`, else a linear address."""
    generation = mmu.slots.generation
    return mmu.mmio.match_gpa(generation, addr) if direct else mmu.mmio.match_gva(generation, addr)


def vcpu_is_mmio_gpa(mmu: KvmMmu, gpa: int) -> bool:
    """The address is the local APIC's page or that of the last MMIO access."""
    return gpa & _PAGE == APIC_DEFAULT_PHYS_BASE or mmu.mmio.match_gpa(mmu.slots.generation, gpa)


def _access(mmu: KvmMmu, write: bool) -> int:
    return (PFERR_USER_MASK if mmu.vcpu.cpl() == 3 else 0) | (PFERR_WRITE_MASK if write else 0)


def cached_mmio_gpa(mmu: KvmMmu, gva: int, write: bool) -> int | None:
    """The physical address of the last MMIO access, if that was to this linear page and may be repeated."""
    vcpu, cache = mmu.vcpu, mmu.mmio
    if not cache.match_gva(mmu.slots.generation, gva):
        return None
    if vcpu.cr0 & X86_CR0_PG:
        if permission_fault(vcpu, guest_paging(vcpu), cache.access, 0, _access(mmu, write)):
            return None
    return cache.gfn << 12 | gva & PAGE_MASK


def vcpu_mmio_gva_to_gpa(
    mmu: KvmMmu, gva: int, exception: X86Exception | None, write: bool
) -> tuple[int, int]:
    """Translate for the emulator: (-1, INVALID_GPA) on a #PF, (1, gpa) for MMIO, else (0, gpa).

    Where 0 is returned there may be memory or none. A cached linear address is not walked again;
    its rights are checked if paging is on.
    """
    gpa = cached_mmio_gpa(mmu, gva, write)
    if gpa is not None:
        return 1, gpa
    gpa = mmu.gva_to_gpa(gva, _access(mmu, write), exception)
    if gpa == INVALID_GPA:
        return -1, gpa
    return int(vcpu_is_mmio_gpa(mmu, gpa)), gpa


def check_mmio_spte(generation: int, spte: int) -> bool:
    """An MMIO SPTE was made under the memslots of now."""
    if generation & KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS:
        return False
    return generation & MMIO_SPTE_GEN_MASK == get_mmio_spte_generation(spte)


def handle_mmio_page_fault(mmu: KvmMmu, addr: int, *, direct: bool) -> int:
    """A fault on reserved bits or an EPT misconfiguration: RET_PF_EMULATE, _INVALID (stale) or _RETRY."""
    if mmio_info_in_cache(mmu, addr, direct=direct):
        return RET_PF_EMULATE
    spte = mmu.get_spte(addr)
    masks = mmu.masks
    if not mmu.mmio_caching or not masks.is_mmio_spte(spte):
        return RET_PF_RETRY
    if not check_mmio_spte(mmu.slots.generation, spte):
        return RET_PF_INVALID
    gva = 0 if direct else addr
    mmu.mmio.store(mmu.slots.generation, gva, masks.get_mmio_spte_gfn(spte), masks.get_mmio_spte_access(spte))
    return RET_PF_EMULATE
