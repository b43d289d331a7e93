"""Guest physical memory: memslots over the pages that userspace gave to the guest.

KVM: struct kvm_memory_slot, struct kvm_memslots, kvm_set_memory_region, the kvm_read_guest and
kvm_write_guest family of virt/kvm/kvm_main.c (Linux 6.12). A guest frame number without a slot is
a hole: whoever accesses it talks to a device (MMIO). There are two address spaces, the normal one
and that of system management mode; where their slots name the same host frames they share memory.

Addresses are in bytes, frame numbers (gfn, host frame) in pages of 4 KiB.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Final, Protocol

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, ZERO_PAGE

KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2
KVM_MEMSLOT_INVALID: Final = 1 << 16  # being deleted or moved; never given by userspace

#: Flags that userspace may give a slot here; guest_memfd needs private memory, which is not modelled.
KVM_MEM_FLAGS: Final = KVM_MEM_LOG_DIRTY_PAGES | KVM_MEM_READONLY

#: Slots with a smaller id belong to userspace and are visible; the others are KVM's own.
KVM_USER_MEM_SLOTS: Final = 32764
TSS_PRIVATE_MEMSLOT: Final = KVM_USER_MEM_SLOTS
APIC_ACCESS_PAGE_PRIVATE_MEMSLOT: Final = KVM_USER_MEM_SLOTS + 1
IDENTITY_PAGETABLE_PRIVATE_MEMSLOT: Final = KVM_USER_MEM_SLOTS + 2

#: Host frames of KVM's own pages lie from here on, beyond those of any guest.
PRIVATE_PFN: Final = 1 << 52

#: Set in the generation while a slot is replaced; nothing is cached under such a generation.
KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS: Final = 1 << 63

KVM_ADDRESS_SPACE_NUM: Final = 2
EFAULT: Final = 14

_GENERATION_MASK: Final = KVM_MEMSLOT_GEN_UPDATE_IN_PROGRESS - 1
_MAX_GFN: Final = 1 << 40


class MemslotError(ValueError):
    """A slot is malformed, overlaps another one or does not exist."""


class MemorySlot:
    """struct kvm_memory_slot: `npages` guest frames from `base_gfn`, in host frames from `userspace_pfn`."""

    __slots__ = ("as_id", "base_gfn", "end_gfn", "flags", "id", "npages", "userspace_pfn")

    def __init__(
        self, slot_id: int, base_gfn: int, npages: int, flags: int, as_id: int, userspace_pfn: int
    ) -> None:
        self.id = slot_id
        self.base_gfn = base_gfn
        self.npages = npages
        self.end_gfn = base_gfn + npages
        self.flags = flags
        self.as_id = as_id
        self.userspace_pfn = userspace_pfn

    def with_flags(self, flags: int) -> MemorySlot:
        """The same frames under other flags."""
        return MemorySlot(self.id, self.base_gfn, self.npages, flags, self.as_id, self.userspace_pfn)


class MemslotListener(Protocol):
    """Who caches translations and hears of changed slots (the MMU)."""

    def memslots_updated(self, generation: int) -> None:
        """A new generation is in force (kvm_arch_memslots_updated)."""

    def flush_shadow_memslot(self, slot: MemorySlot) -> None:
        """A slot goes away or moves (kvm_arch_flush_shadow_memslot)."""

    def enable_log_dirty(self, slot: MemorySlot, gfns: Iterable[int]) -> None:
        """Writes to these frames are to be noticed again (kvm_arch_mmu_enable_log_dirty_pt_masked)."""


class KvmMemslots:
    """struct kvm_memslots: the slots of one address space, sorted by base, and access through them.

    Reads return None, and writes -EFAULT, for a frame that has no slot, for a slot that is being
    deleted, and for writes to a read-only slot. An access over several pages does them in order;
    what was written before the failing one stays.
    """

    __slots__ = ("_bases", "_last", "as_id", "generation", "memory", "slots")

    def __init__(self, memory: GuestMemory, as_id: int) -> None:
        self.memory = memory
        self.as_id = as_id
        self.generation = as_id  # so that the address spaces never share a generation
        self.slots: list[MemorySlot] = []
        self._bases: list[int] = []
        self._last: MemorySlot | None = None

    def replace(self, slots: Iterable[MemorySlot]) -> None:
        """Install another set of slots, already free of overlaps (KVM: kvm_swap_active_memslots)."""
        self.slots = sorted(slots, key=lambda slot: slot.base_gfn)
        self._bases = [slot.base_gfn for slot in self.slots]
        self._last = None
        self.generation = self.generation + KVM_ADDRESS_SPACE_NUM & _GENERATION_MASK

    def gfn_to_memslot(self, gfn: int) -> MemorySlot | None:
        """The slot that holds a frame, None for a hole (KVM: kvm_vcpu_gfn_to_memslot)."""
        slot = self._last
        if slot is not None and slot.base_gfn <= gfn < slot.end_gfn:
            return slot
        index = bisect_right(self._bases, gfn) - 1
        if index < 0:
            return None
        slot = self.slots[index]
        if gfn >= slot.end_gfn:
            return None
        self._last = slot
        return slot

    def is_visible_gfn(self, gfn: int) -> bool:
        """The frame is in a slot of userspace that is not going away (KVM: kvm_is_visible_gfn)."""
        slot = self.gfn_to_memslot(gfn)
        return slot is not None and kvm_is_visible_memslot(slot)

    def page(self, slot: MemorySlot, gfn: int) -> bytes:
        """The contents of a frame of `slot`."""
        pfn = slot.userspace_pfn + gfn - slot.base_gfn
        memory = self.memory
        page = memory.written.get(pfn)
        return page if page is not None else memory.pages.get(pfn, ZERO_PAGE)

    def readable_page(self, gfn: int) -> bytes | None:
        """The contents of a frame, None if it cannot be read."""
        slot = self.gfn_to_memslot(gfn)
        if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
            return None
        return self.page(slot, gfn)

    def read_guest_page(self, gfn: int, offset: int, size: int) -> bytes | None:
        """`size` bytes at `offset` of one frame (KVM: kvm_vcpu_read_guest_page)."""
        page = self.readable_page(gfn)
        return None if page is None else page[offset : offset + size]

    def read_guest(self, gpa: int, size: int) -> bytes | None:
        """`size` bytes at a guest physical address (KVM: kvm_vcpu_read_guest)."""
        data = b""
        while size:
            offset = gpa & PAGE_MASK
            part = min(size, PAGE_SIZE - offset)
            chunk = self.read_guest_page(gpa >> PAGE_SHIFT, offset, part)
            if chunk is None:
                return None
            data += chunk
            gpa += part
            size -= part
        return data

    def writable_slot(self, gfn: int) -> MemorySlot | None:
        """The slot of a frame if the guest may write to it, else None."""
        slot = self.gfn_to_memslot(gfn)
        if slot is None or slot.flags & (KVM_MEMSLOT_INVALID | KVM_MEM_READONLY):
            return None
        return slot

    def write_guest_page(self, gfn: int, data: bytes, offset: int) -> int:
        """Write within one frame; 0 or -EFAULT (KVM: kvm_vcpu_write_guest_page)."""
        slot = self.writable_slot(gfn)
        if slot is None:
            return -EFAULT
        self.store(slot, gfn, offset, data)
        return 0

    def store(self, slot: MemorySlot, gfn: int, offset: int, data: bytes) -> None:
        """Write within a frame of a slot that is known to be writable, and mark it dirty."""
        page = self.page(slot, gfn)
        pfn = slot.userspace_pfn + gfn - slot.base_gfn
        self.memory.written[pfn] = page[:offset] + data + page[offset + len(data) :]
        if slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
            self.memory.dirty.add((slot.as_id, gfn))

    def write_guest(self, gpa: int, data: bytes) -> int:
        """Write at a guest physical address; 0 or -EFAULT (KVM: kvm_vcpu_write_guest)."""
        while data:
            offset = gpa & PAGE_MASK
            part = data[: PAGE_SIZE - offset]
            if self.write_guest_page(gpa >> PAGE_SHIFT, part, offset):
                return -EFAULT
            gpa += len(part)
            data = data[len(part) :]
        return 0

    def cmpxchg(self, slot: MemorySlot, gpa: int, old: bytes, new: bytes) -> bool:
        """Replace `old` by `new` within a frame of a writable slot; False if other bytes are there.

        KVM: __try_cmpxchg_user. The caller marks the page dirty if it wants a mismatch to count.
        """
        gfn, offset = gpa >> PAGE_SHIFT, gpa & PAGE_MASK
        if self.page(slot, gfn)[offset : offset + len(old)] != old:
            return False
        self.store(slot, gfn, offset, new)
        return True

    def mark_page_dirty(self, gfn: int) -> None:
        """Note a write to a frame of a slot with dirty logging (KVM: kvm_vcpu_mark_page_dirty)."""
        slot = self.gfn_to_memslot(gfn)
        if slot is not None and slot.flags & KVM_MEM_LOG_DIRTY_PAGES:
            self.memory.dirty.add((slot.as_id, gfn))


class GuestMemory:
    """The memory of one VM: host frames shared with the case, an overlay of written ones, the slots.

    Attributes:
        pages: Host frame -> contents at the start; never changed, absent frames are zero.
        written: Host frame -> contents, for frames that were written.
        dirty: (address space, gfn) of frames that dirty logging has seen.
        spaces: The address spaces: normal, SMM.
    """

    __slots__ = ("dirty", "listeners", "pages", "spaces", "written")

    def __init__(self, pages: Mapping[int, bytes]) -> None:
        self.pages = pages
        self.written: dict[int, bytes] = {}
        self.dirty: set[tuple[int, int]] = set()
        self.spaces = (KvmMemslots(self, 0), KvmMemslots(self, 1))
        self.listeners: list[MemslotListener] = []

    def changed_pages(self) -> dict[int, bytes]:
        """Host frame -> contents of the frames that differ from the start."""
        pages = self.pages
        return {
            pfn: page for pfn, page in self.written.items() if page != pages.get(pfn, ZERO_PAGE)
        }  # fmt: skip

    def set_memory_region(
        self,
        slot_id: int,
        base_gfn: int,
        npages: int,
        flags: int = 0,
        as_id: int = 0,
        userspace_pfn: int | None = None,
    ) -> None:
        """Create, move, change or, with `npages` 0, delete a slot (KVM: kvm_set_memory_region).

        Without `userspace_pfn` a new slot has the host frames of the same numbers, and an old one
        keeps its own. Deleting and moving first makes the slot invalid, so that translations die
        before memory changes hands.

        Raises:
            MemslotError: See there; KVM's errors are EINVAL and EEXIST.
        """
        space = self.spaces[as_id]
        old = next((slot for slot in space.slots if slot.id == slot_id), None)
        if not npages:
            if old is None:
                raise MemslotError(f"slot {slot_id} of address space {as_id} does not exist")
            self._invalidate(space, old)
            self._install(space, [slot for slot in space.slots if slot.id != slot_id])
            return
        pfn = userspace_pfn
        if pfn is None:
            pfn = base_gfn if old is None else old.userspace_pfn
        new = MemorySlot(slot_id, base_gfn, npages, flags, as_id, pfn)
        self._check(space, old, new)
        if old is not None and old.base_gfn != base_gfn:
            self._invalidate(space, old)
        self._install(space, [*(slot for slot in space.slots if slot.id != slot_id), new])
        if old is not None and flags & ~old.flags & KVM_MEM_LOG_DIRTY_PAGES:
            self._log_dirty(new, range(base_gfn, new.end_gfn))

    @staticmethod
    def _check(space: KvmMemslots, old: MemorySlot | None, new: MemorySlot) -> None:
        _check_slot(new)
        if old is not None and (
            old.npages != new.npages
            or old.userspace_pfn != new.userspace_pfn
            or (old.flags ^ new.flags) & KVM_MEM_READONLY
        ):
            raise MemslotError(f"slot {new.id}: an existing slot cannot change its size, memory or READONLY")
        for slot in space.slots:
            if slot.id != new.id and slot.base_gfn < new.end_gfn and new.base_gfn < slot.end_gfn:
                raise MemslotError(f"slot {new.id} overlaps slot {slot.id}")

    def _invalidate(self, space: KvmMemslots, old: MemorySlot) -> None:
        marked = old.with_flags(old.flags | KVM_MEMSLOT_INVALID)
        self._install(space, [marked if slot is old else slot for slot in space.slots])
        for listener in self.listeners:
            listener.flush_shadow_memslot(old)

    def _install(self, space: KvmMemslots, slots: Iterable[MemorySlot]) -> None:
        space.replace(slots)
        for listener in self.listeners:
            listener.memslots_updated(space.generation)

    def _log_dirty(self, slot: MemorySlot, gfns: Iterable[int]) -> None:
        for listener in self.listeners:
            listener.enable_log_dirty(slot, gfns)

    def set_private_page(self, slot_id: int, gfn: int) -> None:
        """Give KVM a page of its own in both address spaces (KVM: __x86_set_memory_region)."""
        for as_id in range(KVM_ADDRESS_SPACE_NUM):
            self.set_memory_region(slot_id, gfn, 1, 0, as_id, PRIVATE_PFN + slot_id)

    def share_with_smm(self) -> None:
        """Give SMM the slots of the normal address space, on the same host frames."""
        slots = self.spaces[0].slots
        self.spaces[1].replace(
            MemorySlot(slot.id, slot.base_gfn, slot.npages, slot.flags, 1, slot.userspace_pfn)
            for slot in slots
        )

    def get_dirty_log(self, slot: MemorySlot) -> list[int]:
        """Frames of a slot that were written since the last call, sorted (KVM_GET_DIRTY_LOG)."""
        gfns = sorted(
            gfn for as_id, gfn in self.dirty if as_id == slot.as_id and slot.base_gfn <= gfn < slot.end_gfn
        )
        self.dirty.difference_update([(slot.as_id, gfn) for gfn in gfns])
        self._log_dirty(slot, gfns)
        return gfns


def _check_slot(slot: MemorySlot) -> None:
    if slot.npages < 0 or slot.base_gfn < 0 or slot.end_gfn > _MAX_GFN:
        raise MemslotError(f"slot {slot.id}: frames {slot.base_gfn:#x}+{slot.npages:#x} are out of range")
    if slot.flags & ~KVM_MEM_FLAGS:
        raise MemslotError(f"slot {slot.id}: unknown flags {slot.flags:#x}")


def kvm_is_visible_memslot(slot: MemorySlot) -> bool:
    """The slot is one of userspace's and valid."""
    return slot.id < KVM_USER_MEM_SLOTS and not slot.flags & KVM_MEMSLOT_INVALID


def memory_from_pages(pages: Mapping[int, bytes]) -> GuestMemory:
    """Memory with one writable slot for each run of consecutive frames in `pages`."""
    memory = GuestMemory(pages)
    slots: list[MemorySlot] = []
    start = previous = -1
    for gfn in [*sorted(pages), -1]:
        if gfn == previous + 1 and start >= 0:
            previous = gfn
            continue
        if start >= 0:
            slots.append(MemorySlot(len(slots), start, previous + 1 - start, 0, 0, start))
        start = previous = gfn
    memory.spaces[0].replace(slots)
    return memory


def memory_from_regions(pages: Mapping[int, bytes], regions: Iterable[tuple[int, int, int]]) -> GuestMemory:
    """Memory with a slot per (base address, size in bytes, flags), as `kvm.memslots` of a Case has them.

    Raises:
        MemslotError: A region is empty, not page-aligned, overlaps another one or has unknown flags.
    """
    memory = GuestMemory(pages)
    slots: list[MemorySlot] = []
    for index, (base, size, flags) in enumerate(regions):
        if (base | size) & PAGE_MASK or not size:
            raise MemslotError(
                f"memslot {index}: base {base:#x} and size {size:#x} must be multiples of 4096"
            )
        gfn = base >> PAGE_SHIFT
        slots.append(MemorySlot(index, gfn, size >> PAGE_SHIFT, flags, 0, gfn))
        _check_slot(slots[-1])
    slots.sort(key=lambda slot: slot.base_gfn)
    for low, high in pairwise(slots):
        if high.base_gfn < low.end_gfn:
            raise MemslotError(f"slot {max(low.id, high.id)} overlaps slot {min(low.id, high.id)}")
    memory.spaces[0].replace(slots)
    return memory
