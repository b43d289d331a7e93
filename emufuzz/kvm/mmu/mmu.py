"""The MMU of a VM with one vCPU: memory, translations, the MMIO cache, and who must see writes.

KVM: struct kvm_mmu and the MMU parts of struct kvm_arch; kvm_mmu_invlpg, kvm_mmu_new_pgd,
kvm_mmu_reset_context, kvm_mmu_zap_all_fast, page_track.c (Linux 6.12). TLB flushes and other
requests to hardware are counted, as nothing is cached beyond what is modelled here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

from emufuzz.arch.cr import X86_CR0_PG
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.kvm.memslots import KVM_ADDRESS_SPACE_NUM, GuestMemory, KvmMemslots, MemorySlot
from emufuzz.kvm.mmu.hidden import HiddenTables
from emufuzz.kvm.mmu.mmio import MmioCache
from emufuzz.kvm.mmu.pferr import INVALID_GPA, PT_WRITABLE_MASK
from emufuzz.kvm.mmu.shadow import ShadowMmu
from emufuzz.kvm.mmu.spte import (
    MMIO_SPTE_GEN_MASK,
    SHADOW_NONPRESENT_VALUE,
    ept_masks,
    is_shadow_present_pte,
    shadow_masks,
)
from emufuzz.kvm.mmu.state import MmuVcpu
from emufuzz.kvm.mmu.walker import GuestWalker, copy_fault, gva_to_gpa, walk_addr_generic
from emufuzz.kvm.options import KvmOptions

_SHADOW_MAXPHYADDR: Final = 52


class KvmMmu:
    """Translations of one vCPU.

    Attributes:
        vcpu: The vCPU.
        memory: Guest memory.
        hidden: Stands in for the guest's tables where a case has none; None = the guest's count.
        masks: Encoding of shadow entries.
        mmio_caching: Holes are remembered in MMIO SPTEs.
        direct_maps: Translations by guest frame, of EPT or of a guest without paging; one map per
            (SMM, guest mode), as KVM has roots for each.
        shadow: Shadow pages of guest page tables.
        mmio: The MMIO cache.
        last_retry_eip: RIP and address of the last write that was retried after its table was
            unprotected; the same fault again is emulated.
        last_retry_addr: See `last_retry_eip`.
        stats: KVM's counters by name (pf_taken, pf_fixed, pf_emulate, invlpg ...).
        flushes: Requests for TLB flushes by name.
    """

    __slots__ = (
        "direct_maps", "flushes", "hidden", "last_retry_addr", "last_retry_eip", "masks", "memory", "mmio",
        "mmio_caching", "options", "shadow", "stats", "vcpu", "write_tracked",
    )  # fmt: skip

    def __init__(
        self, vcpu: MmuVcpu, memory: GuestMemory, options: KvmOptions, hidden: HiddenTables | None = None
    ) -> None:
        self.vcpu = vcpu
        self.hidden = hidden
        self.memory = memory
        self.options = options
        host_bits = options.host_maxphyaddr
        self.masks = ept_masks(host_bits) if options.ept else shadow_masks(host_bits)
        self.mmio_caching = options.mmio_caching and bool(self.masks.mmio_value)
        self.mmio = MmioCache()
        self.direct_maps: dict[tuple[bool, bool], dict[int, int]] = {}
        self.write_tracked: Counter[int] = Counter()
        self.shadow = ShadowMmu(self)
        self.last_retry_eip = 0
        self.last_retry_addr = 0
        self.stats: Counter[str] = Counter()
        self.flushes: Counter[str] = Counter()
        memory.listeners.append(self)

    @property
    def slots(self) -> KvmMemslots:
        """The vCPU's address space (KVM: kvm_vcpu_memslots)."""
        return self.memory.spaces[self.vcpu.smm]

    @property
    def direct(self) -> bool:
        """Faulting addresses are guest physical (KVM: root_role.direct)."""
        return self.options.ept or not self.vcpu.cr0 & X86_CR0_PG

    @property
    def max_gfn(self) -> int:
        """The last frame that may get an MMIO SPTE (KVM: kvm_mmu_max_gfn)."""
        bits = self.options.host_maxphyaddr if self.options.ept else _SHADOW_MAXPHYADDR
        return (1 << bits - 12) - 1

    @property
    def direct_map(self) -> dict[int, int]:
        """Guest frame -> entry, of the root in use."""
        return self.direct_maps.setdefault((self.vcpu.smm, self.vcpu.in_guest_mode), {})

    def get_spte(self, addr: int) -> int:
        """The last entry on the way to a faulting address (KVM: get_mmio_spte)."""
        if self.direct:
            return self.direct_map.get(addr >> 12, SHADOW_NONPRESENT_VALUE)
        return self.shadow.get_spte(addr)

    # -- the guest's own translation -----------------------------------------------------------

    def walk(self, gva: int, access: int) -> GuestWalker:
        """Walk the guest's tables for PFERR_* bits `access`; paging must be on, unless tables are hidden."""
        if self.hidden is not None:
            return self.hidden.walk(self.vcpu, self.slots, gva, access)
        return walk_addr_generic(self.vcpu, self.slots, gva, access)

    def gva_to_gpa(self, gva: int, access: int, exception: X86Exception | None = None) -> int:
        """Translate a linear address, or INVALID_GPA with the #PF in `exception` (KVM: mmu->gva_to_gpa)."""
        if self.hidden is None:
            return gva_to_gpa(self.vcpu, self.slots, gva, access, exception)
        walker = self.hidden.walk(self.vcpu, self.slots, gva, access)
        if walker.fault is None:
            return self.hidden.gpa(gva)
        if exception is not None:
            copy_fault(walker.fault, exception)
        return INVALID_GPA

    # -- writes that KVM must see --------------------------------------------------------------

    def write_track_add_gfn(self, gfn: int) -> None:
        """From now on writes to a frame fault (KVM: __kvm_write_track_add_gfn)."""
        self.write_tracked[gfn] += 1
        self.write_protect_gfn(gfn)

    def write_track_remove_gfn(self, gfn: int) -> None:
        """Undo one `write_track_add_gfn`."""
        self.write_tracked[gfn] -= 1
        if self.write_tracked[gfn] <= 0:
            del self.write_tracked[gfn]

    def is_write_tracked(self, slot: MemorySlot | None, gfn: int) -> bool:
        """KVM: kvm_gfn_is_write_tracked; a hole never is."""
        return slot is not None and gfn in self.write_tracked

    def write_protect_gfn(self, gfn: int, *, keep_mmu_writable: bool = False) -> bool:
        """Take W from all entries that map a frame; True if one had it.

        With `keep_mmu_writable` the next write only gives W back (dirty logging), else it must be
        handled as a write to a table.
        """
        lost = PT_WRITABLE_MASK if keep_mmu_writable else PT_WRITABLE_MASK | self.masks.mmu_writable
        changed = self.shadow.write_protect_gfn(gfn, lost)
        for entries in self.direct_maps.values():
            spte = entries.get(gfn, SHADOW_NONPRESENT_VALUE)
            if is_shadow_present_pte(spte) and spte & lost:
                entries[gfn] = spte & ~lost
                changed = True
        if changed:
            self.flushes["remote_tlb_gfn"] += 1
        return changed

    # -- what makes translations die -----------------------------------------------------------

    def zap_all(self) -> None:
        """Drop every translation (KVM: kvm_mmu_zap_all_fast)."""
        self.direct_maps.clear()
        self.shadow.zap_all()
        self.flushes["remote_tlb"] += 1

    def memslots_updated(self, generation: int) -> None:
        """MMIO SPTEs hold 19 bits of the generation: drop them all when these wrap around."""
        if not generation & MMIO_SPTE_GEN_MASK & ~(KVM_ADDRESS_SPACE_NUM - 1):
            self.zap_all()

    def flush_shadow_memslot(self, slot: MemorySlot) -> None:
        """A slot goes away: drop everything, or with the quirk disabled only what maps it."""
        if self.options.has_quirk("slot_zap_all"):
            self.zap_all()
            return
        for (smm, _), entries in self.direct_maps.items():
            if smm == bool(slot.as_id):
                for gfn in [gfn for gfn in entries if slot.base_gfn <= gfn < slot.end_gfn]:
                    del entries[gfn]
        self.shadow.zap_all()
        self.flushes["remote_tlb"] += 1

    def enable_log_dirty(self, slot: MemorySlot, gfns: Iterable[int]) -> None:
        """Make the next write to each frame fault once more."""
        wanted = set(gfns)
        mapped = {gfn for entries in self.direct_maps.values() for gfn in entries}
        mapped.update(self.shadow.rmap)
        for gfn in mapped & wanted:
            if slot.base_gfn <= gfn < slot.end_gfn:
                self.write_protect_gfn(gfn, keep_mmu_writable=True)

    def new_pgd(self) -> None:
        """CR3 was loaded (KVM: kvm_mmu_new_pgd): another root, stale leaf tables are synchronised."""
        self.mmio.clear()
        self.shadow.unload()

    def reset_context(self) -> None:
        """The paging mode or address space changed (KVM: kvm_mmu_reset_context, kvm_mmu_unload)."""
        self.mmio.clear()
        self.shadow.unload()

    def invlpg(self, gva: int) -> None:
        """INVLPG (KVM: kvm_mmu_invlpg)."""
        self.invalidate_addr(gva)
        self.stats["invlpg"] += 1

    def invalidate_addr(self, addr: int) -> None:
        """Forget one linear address, unless it is not canonical (KVM: kvm_mmu_invalidate_addr).

        With EPT only hardware holds such translations: the MMIO cache stays as it is.
        """
        bits = 57 if self.options.host_la57 else 48
        if addr + (1 << bits - 1) & (1 << 64) - 1 >= 1 << bits:
            return
        self.flushes["tlb_gva"] += 1
        if self.direct:
            return
        self.mmio.clear(addr)
        self.shadow.invalidate_addr(addr)
