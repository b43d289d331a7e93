"""KVM_GET_REGS and KVM_SET_REGS: userspace looks at general-purpose registers between two KVM_RUNs.

KVM: __get_regs, __set_regs. In the middle of an instruction (a device's answer is awaited) the newest
values are in the emulator's cache, which both calls take care of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from emufuzz.arch.rflags import X86_EFLAGS_FIXED
from emufuzz.emulator.ctxt import writeback_registers
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import kvm_register_read_raw, kvm_register_write_raw, kvm_rip_read, kvm_rip_write
from emufuzz.kvm.rflags import kvm_get_rflags, kvm_set_rflags
from emufuzz.kvm.vcpu import KVM_REQ_EVENT

_GPRS = 16


class KvmRegs(NamedTuple):
    """struct kvm_regs: 16 GPRs in the order of their encoding, RIP, RFLAGS; 64 bits each."""

    gpr: tuple[int, ...]
    rip: int
    rflags: int


def kvm_get_regs(machine: KvmMachine) -> KvmRegs:
    """The vCPU's registers.

    KVM deviation: in the middle of an instruction what it has written until then is handed over, so
    userspace sees, and the guest keeps, a state between two instructions (SDM Vol. 3A 6.6).
    """
    vcpu = machine.vcpu
    if machine.regs_need_sync_to_vcpu:
        writeback_registers(machine.ctxt)
        machine.regs_need_sync_to_vcpu = False
    gpr = tuple(kvm_register_read_raw(vcpu, reg) for reg in range(_GPRS))
    return KvmRegs(gpr, kvm_rip_read(vcpu), kvm_get_rflags(vcpu))


def kvm_set_regs(machine: KvmMachine, gpr: Sequence[int], rip: int, rflags: int) -> None:
    """Store 16 GPRs, RIP and RFLAGS; exceptions that are not being delivered yet are forgotten.

    An instruction that waits for a device goes on with these GPRs, but with its own RIP and RFLAGS,
    which it had read before.

    Raises:
        ValueError: not 16 GPRs.
    """
    vcpu = machine.vcpu
    machine.regs_need_sync_from_vcpu = True
    machine.regs_need_sync_to_vcpu = False
    for reg, value in zip(range(_GPRS), gpr, strict=True):
        kvm_register_write_raw(vcpu, reg, value)
    kvm_rip_write(vcpu, rip)
    kvm_set_rflags(vcpu, rflags | X86_EFLAGS_FIXED)
    vcpu.exception.pending = False
    vcpu.exception_vmexit.pending = False
    vcpu.make_request(KVM_REQ_EVENT)
