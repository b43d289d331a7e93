"""What a test asks of the guest of a machine."""

from __future__ import annotations

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.case.model import Fault
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_register_read_raw, kvm_rip_read
from emufuzz.kvm.rflags import kvm_get_rflags
from emufuzz.kvm.vcpu import Vcpu
from emufuzz.subject.kvm.outcome import queued_fault


class Guest:
    """Questions about the vCPU of a machine."""

    machine: KvmMachine

    @property
    def vcpu(self) -> Vcpu:
        return self.machine.vcpu

    def reg(self, name: str) -> int:
        """A GPR of the vCPU, which in the middle of an instruction may be newer in the emulator."""
        return kvm_register_read_raw(self.vcpu, GPR_NAMES.index(name))

    @property
    def rip(self) -> int:
        return kvm_rip_read(self.vcpu)

    @property
    def flags(self) -> int:
        return kvm_get_rflags(self.vcpu)

    @property
    def pending(self) -> Fault | None:
        """(vector, error code, CR2 of #PF) of the exception that waits for the guest."""
        return queued_fault(self.vcpu.exception)
