"""What the processor must have fetched before it can find an opcode undefined (SDM Vol. 3A 6.15, #UD)."""

from __future__ import annotations

from emufuzz.case.model import PAGE_SHIFT
from emufuzz.emulator.x86emul import MASK32, MASK64
from emufuzz.kvm.guest_virt import user_access
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.mmu.pferr import INVALID_GPA, PFERR_FETCH_MASK
from emufuzz.kvm.rflags import kvm_get_linear_rip
from emufuzz.kvm.segments import is_64_bit_mode
from emufuzz.subject.kvm.probe import NativeFaultError, StoppedError, hardware_access


def check_fetch(machine: KvmMachine, size: int) -> None:
    """Hardware can fetch the first `size` bytes of the instruction at RIP. The limit of CS is not looked at.

    Raises:
        NativeFaultError: The fetch faults, or there is no memory to fetch from.
    """
    linear = kvm_get_linear_rip(machine.vcpu)
    mask = MASK64 if is_64_bit_mode(machine.vcpu) else MASK32
    for address in range(linear, linear + size):
        _check_byte(machine, address & mask)


def _check_byte(machine: KvmMachine, address: int) -> None:
    """KVM may have to map it first."""
    mmu = machine.mmu
    access = PFERR_FETCH_MASK | user_access(mmu)
    try:
        gpa = hardware_access(machine, address, access)
    except StoppedError:
        gpa = mmu.gva_to_gpa(address, access)
    if gpa == INVALID_GPA:
        raise NativeFaultError(f"#PF at {address:#x}")
    if mmu.slots.gfn_to_memslot(gpa >> PAGE_SHIFT) is None:
        raise NativeFaultError(f"exit for code at {gpa:#x}")
