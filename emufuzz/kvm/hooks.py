"""What a vCPU asks of the rest of the machine: guest memory, MMU, the emulator, a nested hypervisor."""

from __future__ import annotations

from collections import Counter
from typing import Protocol


class VcpuHooks(Protocol):
    """The calls that leave the register side of the model."""

    def read_pdptes(self, gpa: int) -> bytes | None:
        """The 32 bytes of the four PDPTEs, None where no memslot is (kvm_vcpu_read_guest_page)."""

    def read_phys(self, gpa: int, size: int) -> bytes | None:
        """Guest-physical memory across pages, None if part of it is in no memslot (kvm_read_guest)."""

    def write_phys(self, gpa: int, data: bytes) -> bool:
        """Store to guest-physical memory across pages; False where that fails (kvm_write_guest)."""

    def mmu_reset_context(self) -> None:
        """The paging mode changed (kvm_mmu_reset_context, kvm_init_mmu)."""

    def mmu_new_pgd(self, cr3: int) -> None:
        """CR3 has a new value (kvm_mmu_new_pgd)."""

    def mmu_invalidate_addr(self, addr: int) -> None:
        """Forget the translation of a linear address (kvm_mmu_invalidate_addr)."""

    def invalidate_pcid(self, pcid: int) -> None:
        """Forget the translations of a PCID (kvm_invalidate_pcid)."""

    def emulate_int_real(self, irq: int, inc_eip: int) -> bool:
        """Deliver an event through the real-mode IVT (kvm_inject_realmode_interrupt).

        The emulator starts at the vCPU's state with 16-bit operands and addresses and an IP beyond
        by `inc_eip`, and on success RIP and RFLAGS are stored. False if it could not be delivered.
        """

    def emulate_skip(self) -> int:
        """kvm_emulate_instruction(EMULTYPE_SKIP): 0 leaves for userspace."""


class IsolatedHooks:
    """A vCPU on its own: no guest memory, no IVT, no code; `calls` counts what it asked of the MMU."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def read_pdptes(self, gpa: int) -> bytes | None:  # noqa: ARG002 - there is no memory
        """No memslot anywhere."""
        return None

    def read_phys(self, gpa: int, size: int) -> bytes | None:  # noqa: ARG002 - there is no memory
        """No memslot anywhere."""
        return None

    def write_phys(self, gpa: int, data: bytes) -> bool:  # noqa: ARG002 - there is no memory
        """No memslot anywhere."""
        return False

    def mmu_reset_context(self) -> None:
        """Count the call."""
        self.calls["mmu_reset_context"] += 1

    def mmu_new_pgd(self, cr3: int) -> None:  # noqa: ARG002 - nothing is cached by CR3
        """Count the call."""
        self.calls["mmu_new_pgd"] += 1

    def mmu_invalidate_addr(self, addr: int) -> None:  # noqa: ARG002 - nothing is cached by address
        """Count the call."""
        self.calls["mmu_invalidate_addr"] += 1

    def invalidate_pcid(self, pcid: int) -> None:  # noqa: ARG002 - nothing is cached by PCID
        """Count the call."""
        self.calls["invalidate_pcid"] += 1

    def emulate_int_real(self, irq: int, inc_eip: int) -> bool:  # noqa: ARG002 - the IVT is absent
        """The IVT cannot be read."""
        return False

    def emulate_skip(self) -> int:
        """The instruction cannot be fetched."""
        return 0
