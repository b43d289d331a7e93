"""A chain of page tables for one linear address, in any paging mode, to test what walks them."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from emufuzz.arch.cr import (
    EFER_LMA,
    EFER_LME,
    X86_CR0_ET,
    X86_CR0_PE,
    X86_CR0_PG,
    X86_CR4_LA57,
    X86_CR4_PAE,
    X86_CR4_PSE,
)
from emufuzz.kvm.memslots import GuestMemory, KvmMemslots
from emufuzz.kvm.mmu.state import PlainPagingState
from emufuzz.kvm.mmu.walker import GuestWalker, walk_addr_generic

P, W, U, A, D, PS, G = 1, 2, 4, 1 << 5, 1 << 6, 1 << 7, 1 << 8
NX = 1 << 63
ALL = P | W | U | A | D
MODES = ("2-level", "pae", "4-level", "5-level")
TOP = {"2-level": 2, "pae": 3, "4-level": 4, "5-level": 5}
ROOT = 0x10  # frame of the table that CR3 points to; lower tables follow
TARGET = 0x80000  # frame of the mapped page, aligned for 2 and 4 MiB pages
ADDR = 0x40201123  # index 1 in each table of 4-level paging


def paging_state(mode: str, **changes: int) -> PlainPagingState:
    """Registers for a mode; `cr0`, `cr4` and `efer` are added to what the mode needs."""
    cr0 = X86_CR0_PG | X86_CR0_PE | X86_CR0_ET | changes.pop("cr0", 0)
    cr4 = {"2-level": X86_CR4_PSE, "5-level": X86_CR4_PAE | X86_CR4_LA57}.get(mode, X86_CR4_PAE)
    efer = EFER_LME | EFER_LMA if TOP[mode] >= 4 else 0
    cpl = changes.pop("cpl", 0)
    return PlainPagingState(
        cr0,
        ROOT << 12,
        cr4 | changes.pop("cr4", 0),
        efer | changes.pop("efer", 0),
        current_cpl=cpl,
        **changes,
    )


class Chain:
    """Tables that map ADDR to TARGET at `leaf` level; `flags` by level replace ALL (PS is added)."""

    def __init__(
        self,
        mode: str,
        flags: Mapping[int, int] | None = None,
        leaf: int = 1,
        addr: int = ADDR,
        slot_flags: int = 0,
        **registers: int,
    ) -> None:
        self.mode, self.leaf, self.addr = mode, leaf, addr
        self.state = paging_state(mode, **registers)
        self.size = 4 if mode == "2-level" else 8
        self.bits = 10 if mode == "2-level" else 9
        pages: dict[int, bytes] = {}
        given = flags or {}
        self.pte_gpa: dict[int, int] = {}
        for number, level in enumerate(range(TOP[mode], leaf - 1, -1)):
            frame = ROOT + number
            default = P if mode == "pae" and level == 3 else ALL
            entry = given.get(level, default) | (frame + 1 if level > leaf else TARGET) << 12
            if level == leaf > 1:
                entry |= PS
            offset = (addr >> 12 + self.bits * (level - 1) & (1 << self.bits) - 1) * self.size
            if mode == "pae" and level == 3:
                offset &= 0x18
                pdptrs = [0] * 4
                pdptrs[offset >> 3] = entry
                self.state.pdptrs = pdptrs
            raw = struct.pack("<I" if self.size == 4 else "<Q", entry)
            pages[frame] = bytes(offset) + raw + bytes(4096 - offset - self.size)
            self.pte_gpa[level] = frame << 12 | offset
        self.memory = GuestMemory(pages)
        self.memory.set_memory_region(0, 0, ROOT + 0x10, slot_flags)

    @property
    def slots(self) -> KvmMemslots:
        return self.memory.spaces[0]

    def walk(self, access: int = 0) -> GuestWalker:
        return walk_addr_generic(self.state, self.slots, self.addr, access)

    def error(self, access: int = 0) -> int | None:
        """The error code of the #PF, None if there is none."""
        fault = self.walk(access).fault
        return None if fault is None else fault.error_code

    def entry(self, level: int) -> int:
        data = self.slots.read_guest(self.pte_gpa[level], self.size)
        assert data is not None
        return int.from_bytes(data, "little")
