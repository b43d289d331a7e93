"""Exits of instructions that KVM carries out by itself, and port I/O.

KVM: kvm_emulate_cpuid, kvm_emulate_halt, kvm_emulate_as_nop, kvm_emulate_monitor_mwait,
handle_invlpg, kvm_emulate_rdpmc, handle_io, handle_pause, handle_vmx_instruction.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.kvm.emulate_ops import trace_cpuid
from emufuzz.kvm.events import kvm_vcpu_has_events
from emufuzz.kvm.exceptions import kvm_inject_gp, kvm_queue_exception, kvm_require_cpl
from emufuzz.kvm.hypercall import kvm_emulate_hypercall
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.msr_index import MSR_MISC_FEATURES_ENABLES
from emufuzz.kvm.pio import kvm_fast_pio
from emufuzz.kvm.pmu import kvm_pmu_rdpmc
from emufuzz.kvm.regs import vmx_get_exit_qual
from emufuzz.kvm.vcpu import MP_STATE_HALTED

KVM_EXIT_HLT: Final = "HLT"

_MASK32: Final = 0xFFFFFFFF
_CPUID_FAULT: Final = 1 << 0
_IO_SIZE: Final = 7
_IO_IN: Final = 1 << 3
_IO_STRING: Final = 1 << 4
_IO_PORT_SHIFT: Final = 16


def kvm_emulate_cpuid(machine: KvmMachine) -> int:
    """Exit 10."""
    vcpu = machine.vcpu
    if vcpu.msrs.get(MSR_MISC_FEATURES_ENABLES, 0) & _CPUID_FAULT and not kvm_require_cpl(vcpu, 0):
        return 1
    regs = vcpu.regs
    eax, ecx = regs[VCPU_REGS_RAX] & _MASK32, regs[VCPU_REGS_RCX] & _MASK32
    found, *values = vcpu.cpuid.cpuid(eax, ecx, exact_only=False)
    trace_cpuid(vcpu, eax, ecx, values, found=found)
    for reg, value in zip((VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX), values, strict=True):
        regs[reg] = value
    return kvm_skip_emulated_instruction(vcpu)


def kvm_emulate_halt_noskip(machine: KvmMachine) -> int:
    """The vCPU sleeps: here with an in-kernel APIC, else it is userspace's to wake it."""
    vcpu = machine.vcpu
    if vcpu.apic is None:
        vcpu.run.leave(KVM_EXIT_HLT)
        return 0
    if kvm_vcpu_has_events(vcpu):
        vcpu.apic.pv_unhalted = False
    else:
        vcpu.mp_state = MP_STATE_HALTED
    return 1


def kvm_emulate_halt(machine: KvmMachine) -> int:
    """Exit 12. KVM deviation: HLT's exit overwrites that of a single step (SDM Vol. 3B 17.3.1.4)."""
    stepped = kvm_skip_emulated_instruction(machine.vcpu)
    return int(bool(kvm_emulate_halt_noskip(machine) and stepped))


def kvm_emulate_as_nop(machine: KvmMachine) -> int:
    """INVD and WBINVD: no caches are modelled."""
    return kvm_skip_emulated_instruction(machine.vcpu)


def kvm_handle_invalid_op(machine: KvmMachine) -> int:
    """#UD: RDRAND, RDSEED and ENCLS exit only if the guest does not have them."""
    kvm_queue_exception(machine.vcpu, UD_VECTOR)
    return 1


def handle_vmx_instruction(machine: KvmMachine) -> int:
    """#UD: the guest has no VMX operation of its own to enter."""
    kvm_queue_exception(machine.vcpu, UD_VECTOR)
    return 1


def kvm_emulate_monitor_mwait(machine: KvmMachine) -> int:
    """Exits 36 and 39. KVM deviation: NOPs even for a guest without them (SDM Vol. 2B MONITOR)."""
    vcpu = machine.vcpu
    if not vcpu.options.has_quirk("mwait_never_ud_faults") and not vcpu.cpuid.has("mwait"):
        return kvm_handle_invalid_op(machine)
    return kvm_skip_emulated_instruction(vcpu)


def handle_pause(machine: KvmMachine) -> int:
    """Exit 40: a spinning vCPU; there is none to yield to."""
    return kvm_skip_emulated_instruction(machine.vcpu)


def handle_invlpg(machine: KvmMachine) -> int:
    """Exit 14; the qualification is the linear address."""
    machine.mmu.invlpg(vmx_get_exit_qual(machine.vcpu))
    return kvm_skip_emulated_instruction(machine.vcpu)


def kvm_emulate_rdpmc(machine: KvmMachine) -> int:
    """Exit 15."""
    vcpu = machine.vcpu
    failed, data = kvm_pmu_rdpmc(vcpu, vcpu.regs[VCPU_REGS_RCX] & _MASK32)
    if failed:
        kvm_inject_gp(vcpu)
        return 1
    vcpu.regs[VCPU_REGS_RAX] = data & _MASK32
    vcpu.regs[VCPU_REGS_RDX] = data >> 32
    return kvm_skip_emulated_instruction(vcpu)


def handle_vmcall(machine: KvmMachine) -> int:
    """Exit 18."""
    return kvm_emulate_hypercall(machine.vcpu)


def handle_io(machine: KvmMachine) -> int:
    """Exit 30: INS and OUTS are emulated, IN and OUT are not."""
    vcpu = machine.vcpu
    qualification = vmx_get_exit_qual(vcpu)
    if qualification & _IO_STRING:
        return machine.emulate(0)
    size = (qualification & _IO_SIZE) + 1
    port = qualification >> _IO_PORT_SHIFT & 0xFFFF
    return kvm_fast_pio(vcpu, machine.pio, machine.buses, size, port, in_=bool(qualification & _IO_IN))
