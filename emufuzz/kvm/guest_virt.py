"""Guest memory by linear address, for KVM itself and for the emulator's *_std and fetch callbacks.

KVM: kvm_read_guest_virt_helper, kvm_write_guest_virt_helper, kvm_fetch_guest_virt,
kvm_read_guest_virt, kvm_write_guest_virt_system. No access here ever reaches a device.
"""

from __future__ import annotations

from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.emulator.x86emul import (
    MASK64,
    X86EMUL_CONTINUE,
    X86EMUL_IO_NEEDED,
    X86EMUL_PROPAGATE_FAULT,
)
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.mmu.pferr import INVALID_GPA, PFERR_FETCH_MASK, PFERR_USER_MASK


def read_guest_virt(
    mmu: KvmMmu, addr: int, size: int, access: int, exception: X86Exception | None
) -> tuple[int, bytes]:
    """Read page by page: (X86EMUL_* result, data).

    Args:
        mmu: The vCPU's MMU.
        addr: Linear address; it wraps at 2^64 only, in every mode.
        size: Bytes.
        access: PFERR_* bits of the access.
        exception: Filled for X86EMUL_PROPAGATE_FAULT; None where the caller has no use for it.

    Returns:
        X86EMUL_IO_NEEDED where a page has no memory.
    """
    data = b""
    while True:
        gpa = mmu.gva_to_gpa(addr, access, exception)
        if gpa == INVALID_GPA:
            return X86EMUL_PROPAGATE_FAULT, b""
        offset = addr & PAGE_MASK
        part = min(size, PAGE_SIZE - offset)
        piece = mmu.slots.read_guest_page(gpa >> PAGE_SHIFT, offset, part)
        if piece is None:
            return X86EMUL_IO_NEEDED, b""
        data += piece
        size -= part
        if not size:
            return X86EMUL_CONTINUE, data
        addr = addr + part & MASK64


def write_guest_virt(mmu: KvmMmu, addr: int, data: bytes, access: int, exception: X86Exception | None) -> int:
    """Write as `read_guest_virt` reads; what was written before a failure stays.

    KVM deviation: shadow pages are not told, so a write to a shadowed table goes unnoticed (SDM
    Vol. 3A 4.10.4: only stale TLB entries may survive it).
    """
    while True:
        gpa = mmu.gva_to_gpa(addr, access, exception)
        if gpa == INVALID_GPA:
            return X86EMUL_PROPAGATE_FAULT
        part = data[: PAGE_SIZE - (addr & PAGE_MASK)]
        if mmu.slots.write_guest(gpa, part) < 0:
            return X86EMUL_IO_NEEDED
        data = data[len(part) :]
        if not data:
            return X86EMUL_CONTINUE
        addr = addr + len(part) & MASK64


def user_access(mmu: KvmMmu) -> int:
    """PFERR_USER_MASK at CPL 3, else 0."""
    return PFERR_USER_MASK if mmu.vcpu.cpl() == 3 else 0


def fetch_guest_virt(mmu: KvmMmu, addr: int, size: int, exception: X86Exception) -> tuple[int, bytes]:
    """Instruction bytes within one page."""
    gpa = mmu.gva_to_gpa(addr, user_access(mmu) | PFERR_FETCH_MASK, exception)
    if gpa == INVALID_GPA:
        return X86EMUL_PROPAGATE_FAULT, b""
    data = mmu.slots.read_guest_page(gpa >> PAGE_SHIFT, addr & PAGE_MASK, size)
    return (X86EMUL_IO_NEEDED, b"") if data is None else (X86EMUL_CONTINUE, data)


def kvm_read_guest_virt(mmu: KvmMmu, addr: int, size: int, exception: X86Exception) -> tuple[int, bytes]:
    """Read as the guest does, at its privilege level."""
    return read_guest_virt(mmu, addr, size, user_access(mmu), exception)
