"""A vCPU's hooks with guest-physical memory that can be read and written across pages."""

from __future__ import annotations

from support.vcpus import Hooks


class PhysHooks(Hooks):
    """`size` bytes of memory from address 0; nothing beyond."""

    def __init__(self, size: int = 0x40000) -> None:
        super().__init__()
        self.phys = bytearray(size)
        self.invalidated: list[int] = []

    def read_phys(self, gpa: int, size: int) -> bytes | None:
        return bytes(self.phys[gpa : gpa + size]) if gpa + size <= len(self.phys) else None

    def write_phys(self, gpa: int, data: bytes) -> bool:
        if gpa + len(data) > len(self.phys):
            return False
        self.phys[gpa : gpa + len(data)] = data
        return True

    def read_pdptes(self, gpa: int) -> bytes | None:
        return self.read_phys(gpa, 32)

    def mmu_invalidate_addr(self, addr: int) -> None:
        self.invalidated.append(addr)
