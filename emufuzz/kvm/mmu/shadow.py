"""Shadow paging: KVM's own tables, built from the guest's, and how they are kept true to them.

KVM: kvm_mmu_get_shadow_page, kvm_mmu_prepare_zap_page, mmu_try_to_unsync_pages, mmu_sync_children,
mmu_alloc_shadow_roots, kvm_mmu_track_write, FNAME(sync_spte) (Linux 6.12). The page fault itself is in
`shadow_fault`.

A guest table of the last level may go out of sync: the guest writes to it freely until it flushes
its TLB, as hardware would not see the change before either. Tables above are write-tracked: a write
to them faults and is emulated. Entries are not prefetched.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from emufuzz.kvm.memslots import KVM_MEM_LOG_DIRTY_PAGES, MemorySlot
from emufuzz.kvm.mmu.paging import PT32_ROOT_LEVEL, PT32E_ROOT_LEVEL, GuestPaging, guest_paging
from emufuzz.kvm.mmu.pferr import (
    ACC_ALL,
    ACC_WRITE_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_WRITABLE_MASK,
)
from emufuzz.kvm.mmu.shadow_page import (
    ShadowPage,
    ShadowRole,
    detect_write_misaligned,
    get_written_sptes,
    gpte_access,
    spte_index,
)
from emufuzz.kvm.mmu.spte import SHADOW_NONPRESENT_VALUE, is_shadow_present_pte, spte_to_pfn

if TYPE_CHECKING:
    from emufuzz.kvm.mmu.mmu import KvmMmu

_BASE_ADDR_MASK: Final = (1 << 52) - (1 << 12)
_FLOOD: Final = 3


class ShadowMmu:
    """All shadow pages, found by guest frame, and the roots in use.

    `roots` is None until they are loaded, an empty list if CR3 points outside of memory, one page
    in 4- and 5-level paging, else four of which some may be None.
    """

    __slots__ = ("_roots_of", "by_gfn", "mmu", "rmap", "roots")

    def __init__(self, mmu: KvmMmu) -> None:
        self.mmu = mmu
        self.by_gfn: dict[int, list[ShadowPage]] = {}
        self.rmap: dict[int, set[tuple[ShadowPage, int]]] = {}
        self.roots: list[ShadowPage | None] | None = None
        self._roots_of: tuple[object, ...] = ()

    # -- roots and walks -----------------------------------------------------------------------

    def unload(self) -> None:
        """Forget the roots; their pages stay and are found again."""
        self.roots = None

    def load_roots(self, paging: GuestPaging) -> list[ShadowPage | None]:
        """The roots for CR3 as it is now, with all that is out of sync below them synchronised."""
        roots = self.roots
        vcpu = self.mmu.vcpu
        mode = (paging.level, paging.role, vcpu.smm, vcpu.in_guest_mode)
        if (
            roots is None
            or mode != self._roots_of
            or any(root is not None and root.invalid for root in roots)
        ):
            roots = self.roots = self._alloc_roots(paging)
            self._roots_of = mode
            for root in roots:
                if root is not None:
                    self.sync_children(root, paging)
        return roots

    def _alloc_roots(self, paging: GuestPaging) -> list[ShadowPage | None]:
        vcpu, slots = self.mmu.vcpu, self.mmu.slots
        cr3_gfn = (vcpu.cr3 & _BASE_ADDR_MASK) >> 12
        if not slots.is_visible_gfn(cr3_gfn):
            return []
        if paging.level > PT32E_ROOT_LEVEL:
            return [self._get(cr3_gfn, self._root_role(paging, paging.level, 0), paging)]
        if paging.level == PT32_ROOT_LEVEL:
            return [self._get(cr3_gfn, self._root_role(paging, 2, quadrant), paging) for quadrant in range(4)]
        roots: list[ShadowPage | None] = []
        for pdptr in vcpu.pdptrs:
            gfn = (pdptr & _BASE_ADDR_MASK) >> 12
            usable = pdptr & PT_PRESENT_MASK and slots.is_visible_gfn(gfn)
            roots.append(self._get(gfn, self._root_role(paging, 2, 0), paging) if usable else None)
        return roots

    def _root_role(self, paging: GuestPaging, level: int, quadrant: int) -> ShadowRole:
        vcpu = self.mmu.vcpu
        return ShadowRole(level, ACC_ALL, False, quadrant, paging.role, vcpu.smm, vcpu.in_guest_mode)

    def root_for(self, addr: int, paging: GuestPaging) -> ShadowPage | None:
        """The topmost shadow page for an address."""
        roots = self.load_roots(paging)
        if not roots:
            return None
        return roots[0] if paging.level > PT32E_ROOT_LEVEL else roots[addr >> 30 & 3]

    def walk(self, addr: int) -> Iterator[ShadowPage]:
        """The shadow pages on the way to an address, as far as they exist."""
        sp = self.root_for(addr, guest_paging(self.mmu.vcpu))
        while sp is not None:
            yield sp
            sp = sp.children.get(spte_index(addr, sp.role.level))

    def get_spte(self, addr: int) -> int:
        """The last entry on the way to a linear address."""
        spte = SHADOW_NONPRESENT_VALUE
        for sp in self.walk(addr):
            spte = sp.spt.get(spte_index(addr, sp.role.level), SHADOW_NONPRESENT_VALUE)
        return spte

    # -- pages ---------------------------------------------------------------------------------

    def child_sp(
        self, sp: ShadowPage, index: int, gfn: int, direct: bool, access: int, paging: GuestPaging
    ) -> ShadowPage:
        """The page below an entry, made or found if need be, and linked (KVM: kvm_mmu_get_child_sp).

        Before it is linked it is synchronised: hardware must not find there what the guest removed.
        """
        quadrant = index & 1 if paging.has_4_byte_gpte and not direct else sp.role.quadrant
        role = sp.role._replace(level=sp.role.level - 1, access=access, direct=direct, quadrant=quadrant)
        child = sp.children.get(index)
        if child is not None and child.gfn == gfn and child.role == role:
            return child
        self.zap_pte(sp, index)
        child = self._get(gfn, role, paging)
        if role.level > 1:
            self.sync_children(child, paging)
        sp.children[index] = child
        child.parents.add((sp, index))
        return child

    def _get(self, gfn: int, role: ShadowRole, paging: GuestPaging) -> ShadowPage:
        """kvm_mmu_get_shadow_page: look up by frame and role, or make a new one."""
        for sp in list(self.by_gfn.get(gfn, ())):
            if sp.role != role:
                if role.level > 1 and sp.unsync:
                    self.zap(sp)  # the guest uses the frame for something else by now
                continue
            if not sp.unsync or self.sync_page(sp, paging):
                sp.write_flooding_count = 0
                return sp
        return self._alloc(gfn, role)

    def _alloc(self, gfn: int, role: ShadowRole) -> ShadowPage:
        sp = ShadowPage(gfn, role)
        self.by_gfn.setdefault(gfn, []).append(sp)
        self.mmu.stats["mmu_cache_miss"] += 1
        if not role.direct:
            if role.level > 1:
                self.mmu.write_track_add_gfn(gfn)
            else:
                self.mmu.write_protect_gfn(gfn)
        return sp

    def zap(self, sp: ShadowPage) -> None:
        """Take a page out of use (KVM: kvm_mmu_prepare_zap_page)."""
        self.mmu.stats["mmu_shadow_zapped"] += 1
        for unsync in list(self.unsync_below(sp)):
            if unsync is not sp:
                self.zap(unsync)
        for index in [*sp.spt, *sp.children]:
            self.zap_pte(sp, index)
        for parent, index in sp.parents:
            parent.children.pop(index, None)
        sp.parents.clear()
        pages = self.by_gfn.get(sp.gfn, [])
        if sp in pages:
            pages.remove(sp)
            if not sp.role.direct and sp.role.level > 1:
                self.mmu.write_track_remove_gfn(sp.gfn)
        if not pages:
            self.by_gfn.pop(sp.gfn, None)
        sp.unsync = False
        sp.invalid = True

    def zap_all(self) -> None:
        """Take all pages out of use."""
        for pages in list(self.by_gfn.values()):
            for sp in list(pages):
                if not sp.invalid:
                    self.zap(sp)
        self.roots = None

    def zap_pte(self, sp: ShadowPage, index: int) -> bool:
        """Clear an entry; True if it was present (KVM: mmu_page_zap_pte)."""
        child = sp.children.pop(index, None)
        if child is not None:
            child.parents.discard((sp, index))
            return True
        spte = sp.spt.pop(index, SHADOW_NONPRESENT_VALUE)
        shadowed = sp.shadowed.pop(index, None)
        if shadowed is not None:
            users = self.rmap[shadowed[0]]
            users.discard((sp, index))
            if not users:
                del self.rmap[shadowed[0]]
        return is_shadow_present_pte(spte)

    def indirect_pages(self, gfn: int) -> list[ShadowPage]:
        """The pages that shadow a table in this frame (KVM: for_each_gfn_valid_sp_with_gptes)."""
        return [sp for sp in self.by_gfn.get(gfn, ()) if not sp.role.direct]

    @property
    def indirect_shadow_pages(self) -> bool:
        """Some guest table is shadowed."""
        return any(not sp.role.direct for pages in self.by_gfn.values() for sp in pages)

    # -- leaf entries --------------------------------------------------------------------------

    def set_leaf(self, sp: ShadowPage, index: int, spte: int, shadowed: tuple[int, int] | None) -> None:
        """Store a leaf entry; `shadowed` is (gfn, rights) if it maps memory."""
        self.zap_pte(sp, index)
        sp.spt[index] = spte
        if shadowed is not None:
            sp.shadowed[index] = shadowed
            self.rmap.setdefault(shadowed[0], set()).add((sp, index))

    def write_protect_gfn(self, gfn: int, lost: int) -> bool:
        """Clear the bits `lost` in all leaf entries for a frame; True if one had any."""
        changed = False
        for sp, index in self.rmap.get(gfn, ()):
            if sp.spt[index] & lost:
                sp.spt[index] &= ~lost
                changed = True
        return changed

    def try_to_unsync_pages(self, slot: MemorySlot | None, gfn: int, *, can_unsync: bool) -> bool:
        """Whether a frame may become writable; tables of the last level in it go out of sync."""
        if self.mmu.is_write_tracked(slot, gfn):
            return False
        pages = self.indirect_pages(gfn)
        if pages and not can_unsync:
            return False
        for sp in pages:
            if not sp.unsync:
                sp.unsync = True
                self.mmu.stats["mmu_unsync"] += 1
        return True

    # -- keeping true to the guest's tables ------------------------------------------------------

    def unsync_below(self, sp: ShadowPage) -> Iterator[ShadowPage]:
        """Pages out of sync that can be reached from a page, itself included."""
        seen: set[ShadowPage] = set()
        todo = [sp]
        while todo:
            page = todo.pop()
            if page in seen:
                continue
            seen.add(page)
            if page.unsync:
                yield page
            todo.extend(page.children.values())

    def sync_children(self, parent: ShadowPage, paging: GuestPaging) -> None:
        """Synchronise what is below a page and write-protect it again (KVM: mmu_sync_children)."""
        for sp in list(self.unsync_below(parent)):
            self.mmu.write_protect_gfn(sp.gfn)
            sp.unsync = False
            self.sync_page(sp, paging)

    def sync_page(self, sp: ShadowPage, paging: GuestPaging) -> bool:
        """Bring all entries of a last-level page up to date; False if the page had to be zapped."""
        for index in list(sp.spt):
            result = self.sync_spte(sp, index, paging)
            if result < 0:
                self.zap(sp)
                return False
            if result:
                self.mmu.flushes["remote_tlb"] += 1
        return True

    def sync_spte(self, sp: ShadowPage, index: int, paging: GuestPaging) -> int:
        """Read the guest's entry again: -1 unreadable, 1 changed, 0 as it was or stricter flags only."""
        size = 4 if paging.has_4_byte_gpte else 8
        first = (sp.gfn << 12) + (sp.role.quadrant << 9) * size
        data = self.mmu.slots.read_guest(first + index * size, size)
        if data is None:
            return -1
        gpte = int.from_bytes(data, "little")
        if self._invalid_gpte(gpte, paging):
            self.zap_pte(sp, index)
            return 1
        gfn = (gpte & _BASE_ADDR_MASK) >> 12
        access = sp.role.access & gpte_access(gpte)
        if not gpte & PT_DIRTY_MASK:
            access &= ~ACC_WRITE_MASK
        if index not in sp.shadowed:
            return self._sync_mmio_spte(sp, index, gfn, access)
        old_gfn, old_access = sp.shadowed[index]
        if gfn != old_gfn:
            self.zap_pte(sp, index)
            return 1
        return 0 if access == old_access else self._update_access(sp, index, gfn, access)

    @staticmethod
    def _invalid_gpte(gpte: int, paging: GuestPaging) -> bool:
        wanted = PT_PRESENT_MASK | PT_ACCESSED_MASK
        return gpte & wanted != wanted or bool(gpte & paging.rsvd[gpte >> 7 & 1][1])

    def _sync_mmio_spte(self, sp: ShadowPage, index: int, gfn: int, access: int) -> int:
        mmu = self.mmu
        if mmu.masks.get_mmio_spte_gfn(sp.spt[index]) != gfn:
            self.zap_pte(sp, index)
        else:
            sp.spt[index] = mmu.masks.make_mmio_spte(mmu.slots.generation, gfn, access)
        return 0

    def _update_access(self, sp: ShadowPage, index: int, gfn: int, access: int) -> int:
        masks, old = self.mmu.masks, sp.spt[index]
        slot = self.mmu.slots.gfn_to_memslot(gfn)
        spte = self.make_spte(slot, access, gfn, spte_to_pfn(old), bool(old & masks.host_writable), False)[0]
        sp.spt[index] = spte
        sp.shadowed[index] = (gfn, access)
        return int(bool(old & ~spte & (PT_WRITABLE_MASK | masks.accessed | masks.dirty)))

    def make_spte(
        self, slot: MemorySlot | None, access: int, gfn: int, pfn: int, host_writable: bool, can_unsync: bool
    ) -> tuple[int, bool]:
        """A leaf entry, and whether it had to be write-protected (KVM: make_spte)."""
        wrprot = False
        if host_writable and access & ACC_WRITE_MASK:
            wrprot = not self.try_to_unsync_pages(slot, gfn, can_unsync=can_unsync)
        spte = self.mmu.masks.make_spte(access, pfn, host_writable=host_writable, wrprot=wrprot)
        if spte & PT_WRITABLE_MASK and slot is not None and slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
            self.mmu.slots.mark_page_dirty(gfn)
        return spte, wrprot

    def invalidate_addr(self, addr: int) -> None:
        """INVLPG: synchronise the entry of one address (KVM: __kvm_mmu_invalidate_addr)."""
        paging = guest_paging(self.mmu.vcpu)
        for sp in list(self.walk(addr)):
            index = spte_index(addr, sp.role.level)
            if sp.unsync and index in sp.spt:
                result = self.sync_spte(sp, index, paging)
                if result < 0:
                    self.zap_pte(sp, index)
                if result:
                    self.mmu.flushes["remote_tlb_gfn"] += 1

    def track_write(self, gpa: int, size: int) -> None:
        """The emulator wrote to guest memory (KVM: kvm_mmu_track_write)."""
        flush = zapped = False
        for sp in self.indirect_pages(gpa >> 12):
            if detect_write_misaligned(sp, gpa, size) or self._flooding(sp):
                self.zap(sp)
                self.mmu.stats["mmu_flooded"] += 1
                zapped = True
                continue
            for index in get_written_sptes(sp, gpa):
                flush |= self.zap_pte(sp, index)
        if flush or zapped:
            self.mmu.flushes["remote_tlb"] += 1

    @staticmethod
    def _flooding(sp: ShadowPage) -> bool:
        """Many writes without a page fault in between: probably no page table any more."""
        if sp.role.level == 1:
            return False
        sp.write_flooding_count += 1
        return sp.write_flooding_count >= _FLOOD
