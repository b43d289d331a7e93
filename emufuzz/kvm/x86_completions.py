"""What goes on after userspace has answered an exit that the emulator made.

KVM: complete_emulated_pio, complete_emulated_mmio, complete_emulated_rdmsr,
complete_emulated_msr_access, complete_emulated_insn_gp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RDX
from emufuzz.emulator.x86emul import EMULTYPE_NO_DECODE, EMULTYPE_SKIP
from emufuzz.kvm.emulated_mmio import advance_mmio
from emufuzz.kvm.emultype import EMULTYPE_COMPLETE_USER_EXIT
from emufuzz.kvm.exceptions import kvm_inject_gp
from emufuzz.kvm.vcpu import CompleteUserspaceIo, Vcpu

if TYPE_CHECKING:
    from emufuzz.kvm.machine import KvmMachine

_MASK32: Final = 0xFFFFFFFF
_SKIP_AFTER_EXIT: Final = EMULTYPE_NO_DECODE | EMULTYPE_SKIP | EMULTYPE_COMPLETE_USER_EXIT


def complete_emulated_pio(machine: KvmMachine) -> CompleteUserspaceIo:
    """Run the IN or INS again, with the answer waiting in the request."""
    return lambda _: machine.emulate(EMULTYPE_NO_DECODE)


def complete_emulated_mmio(machine: KvmMachine) -> CompleteUserspaceIo:
    """Ask for the next piece, or end a write, or run the reading instruction again."""

    def complete(vcpu: Vcpu) -> int:
        if not advance_mmio(machine):
            vcpu.complete_userspace_io = complete
            return 0
        if machine.mmio.is_write:
            return 1
        machine.mmio.read_completed = True
        return machine.emulate(EMULTYPE_NO_DECODE)

    return complete


def complete_userspace_rdmsr(vcpu: Vcpu) -> None:
    """Take the value that userspace gives, unless it reports an error."""
    answer = vcpu.run.data
    if not answer["error"]:
        vcpu.regs[VCPU_REGS_RAX] = answer["data"] & _MASK32
        vcpu.regs[VCPU_REGS_RDX] = answer["data"] >> 32 & _MASK32


def _complete_emulated_insn_gp(machine: KvmMachine, vcpu: Vcpu) -> int:
    if vcpu.run.data["error"]:
        kvm_inject_gp(vcpu)
        return 1
    return machine.emulate(_SKIP_AFTER_EXIT)


def complete_emulated_msr_access(machine: KvmMachine) -> CompleteUserspaceIo:
    """WRMSR: #GP if userspace says so, else the instruction ends."""
    return lambda vcpu: _complete_emulated_insn_gp(machine, vcpu)


def complete_emulated_rdmsr(machine: KvmMachine) -> CompleteUserspaceIo:
    """RDMSR, the same with a value."""

    def complete(vcpu: Vcpu) -> int:
        complete_userspace_rdmsr(vcpu)
        return _complete_emulated_insn_gp(machine, vcpu)

    return complete
