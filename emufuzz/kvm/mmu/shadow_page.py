"""A shadow page: KVM's translation of one guest page table in one role.

KVM: union kvm_mmu_page_role, struct kvm_mmu_page, detect_write_misaligned, get_written_sptes (Linux 6.12).
"""

from __future__ import annotations

from typing import NamedTuple

from emufuzz.kvm.mmu.paging import PT32_ROOT_LEVEL
from emufuzz.kvm.mmu.pferr import ACC_ALL, PT64_NX_MASK


class ShadowRole(NamedTuple):
    """union kvm_mmu_page_role: guest frames are shadowed once per role.

    `mode` holds the control bits that matter (see GuestPaging.role); `quadrant` tells which part of
    a 32-bit table, whose entries are half as big, a shadow page stands for; `direct` pages split a
    large guest page and have no guest table.
    """

    level: int
    access: int
    direct: bool
    quadrant: int
    mode: tuple[bool, ...]
    smm: bool
    guest_mode: bool


class ShadowPage:
    """struct kvm_mmu_page. `spt` has leaf entries by index, `children` the pages below.

    `shadowed` has (gfn, rights) of each leaf entry that maps memory.
    """

    __slots__ = (
        "children", "gfn", "invalid", "parents", "role", "shadowed", "spt", "unsync", "write_flooding_count"
    )  # fmt: skip

    def __init__(self, gfn: int, role: ShadowRole) -> None:
        self.gfn = gfn
        self.role = role
        self.spt: dict[int, int] = {}
        self.shadowed: dict[int, tuple[int, int]] = {}
        self.children: dict[int, ShadowPage] = {}
        self.parents: set[tuple[ShadowPage, int]] = set()
        self.unsync = False
        self.invalid = False
        self.write_flooding_count = 0


def spte_index(addr: int, level: int) -> int:
    """Index of an address in a shadow page, which always has 512 entries."""
    return addr >> 12 + 9 * (level - 1) & 511


def gpte_access(gpte: int) -> int:
    """ACC_* rights of one guest entry."""
    return (gpte & ACC_ALL) ^ ((gpte & PT64_NX_MASK) >> 63)


def _entry_size(sp: ShadowPage) -> int:
    return 4 if sp.role.mode[0] else 8


def detect_write_misaligned(sp: ShadowPage, gpa: int, size: int) -> bool:
    """The write does not look like one to a page table entry (KVM: detect_writedetect_write_misaligned)."""
    offset, inside = gpa & 0xFFF, _entry_size(sp) - 1
    if not offset & inside and size == 1:
        return False  # a clear_bit of the flags
    return bool((offset ^ offset + size - 1) & ~inside) or size < 4


def get_written_sptes(sp: ShadowPage, gpa: int) -> list[int]:
    """Indices of the shadow entries that stand for a guest entry (KVM: getget_written_sptes)."""
    offset = gpa & 0xFFF
    if not sp.role.mode[0]:
        return [offset >> 3]
    offset <<= 1
    count = 1
    if sp.role.level == PT32_ROOT_LEVEL:
        # a 4 MiB entry of the guest is two of 2 MiB here
        offset = (offset & ~7) << 1
        count = 2
    if offset >> 12 != sp.role.quadrant:
        return []
    index = (offset & 0xFFF) >> 3
    return list(range(index, index + count))
