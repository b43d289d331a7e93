"""VMCALL as a hypercall of KVM, or of Hyper-V where the guest has enabled that.

KVM: kvm_emulate_hypercall, __kvm_emulate_hypercall, complete_hypercall_exit, kvm_pv_clock_pairing,
kvm_sched_yield. Numbers and results: the kernel's Documentation/virt/kvm/x86/hypercalls.rst.

Xen's hypercalls, which KVM looks at first, are not modelled.
"""

from __future__ import annotations

import struct
from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX, VCPU_REGS_RSI
from emufuzz.kvm.hyperv import kvm_hv_hypercall, kvm_hv_hypercall_enabled
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.lapic_ipi import KVM_EINVAL, kvm_pv_kick_cpu_op, kvm_pv_send_ipi
from emufuzz.kvm.lapic_irq import emit
from emufuzz.kvm.msr_index import MSR_IA32_TSC
from emufuzz.kvm.regs import kvm_register_write_raw
from emufuzz.kvm.segments import is_64_bit_mode, vmx_get_cpl
from emufuzz.kvm.vcpu import Vcpu

KVM_EXIT_HYPERCALL: Final = "HYPERCALL"
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1

KVM_HC_VAPIC_POLL_IRQ: Final = 1
KVM_HC_KICK_CPU: Final = 5
KVM_HC_CLOCK_PAIRING: Final = 9
KVM_HC_SEND_IPI: Final = 10
KVM_HC_SCHED_YIELD: Final = 11
KVM_HC_MAP_GPA_RANGE: Final = 12

KVM_EPERM: Final = 1
KVM_EFAULT: Final = 14
KVM_EOPNOTSUPP: Final = 95
KVM_ENOSYS: Final = 1000

KVM_FEATURE_PV_UNHALT: Final = 7
KVM_FEATURE_PV_SEND_IPI: Final = 11
KVM_FEATURE_PV_SCHED_YIELD: Final = 13

_CLOCK_PAIRING_WALLCLOCK: Final = 0
#: struct kvm_clock_pairing: seconds, nanoseconds, TSC, flags, nine words of padding.
_CLOCK_PAIRING: Final = struct.Struct("<qqQI36x")
_PAGE_SHIFT: Final = 12
_PAGE_MASK: Final = 0xFFF
_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1


def guest_pv_has(vcpu: Vcpu, feature: int) -> bool:
    """KVM's CPUID leaf offers a feature; everything is offered unless userspace has this enforced."""
    return not vcpu.options.enforce_pv_features or bool(vcpu.cpuid.pv_features() >> feature & 1)


def kvm_emulate_hypercall(vcpu: Vcpu) -> int:
    """VMCALL of the guest: number in RAX, arguments in RBX, RCX, RDX, RSI, result in RAX.

    Returns:
        1 to go on in the guest, 0 to leave to userspace, whose answer is then `run.data["ret"]`.

    KVM deviation: outside 64-bit mode bits above 31 of RAX are dropped from the number, but not where
    the request for userspace is recognised: it is answered with 0 as well, and left pending (SDM Vol. 1
    3.4.1.1 has those bits undefined there).
    """
    if kvm_hv_hypercall_enabled(vcpu):
        return kvm_hv_hypercall(vcpu)
    nr = vcpu.regs[VCPU_REGS_RAX]
    arguments = [
        vcpu.regs[reg] for reg in (VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX, VCPU_REGS_RSI)
    ]  # fmt: skip
    ret = emulate_hypercall(vcpu, nr, *arguments, op_64_bit=is_64_bit_mode(vcpu), cpl=vmx_get_cpl(vcpu))
    if nr == KVM_HC_MAP_GPA_RANGE and not ret:
        return 0
    return _finish(vcpu, ret)


def _finish(vcpu: Vcpu, ret: int) -> int:
    """Store the result, 32 bits of it outside 64-bit mode, and go on."""
    kvm_register_write_raw(vcpu, VCPU_REGS_RAX, ret & (_MASK64 if is_64_bit_mode(vcpu) else _MASK32))
    return kvm_skip_emulated_instruction(vcpu)


def emulate_hypercall(
    vcpu: Vcpu, nr: int, a0: int, a1: int, a2: int, a3: int, *, op_64_bit: bool, cpl: int
) -> int:
    """One of KVM's own hypercalls: its result, negative for errors (KVM: __kvm_emulate_hypercall).

    A request for userspace returns 0 with `vcpu.run` filled in.
    """
    emit(vcpu, "kvm_hypercall", nr=nr, a0=a0, a1=a1, a2=a2, a3=a3)
    if not op_64_bit:
        nr, a0, a1, a2, a3 = (value & _MASK32 for value in (nr, a0, a1, a2, a3))
    if cpl:
        return -KVM_EPERM
    if nr == KVM_HC_VAPIC_POLL_IRQ:
        return 0
    if nr == KVM_HC_KICK_CPU and guest_pv_has(vcpu, KVM_FEATURE_PV_UNHALT):
        kvm_pv_kick_cpu_op(vcpu, a1)
        return 0
    if nr == KVM_HC_CLOCK_PAIRING:
        return _kvm_pv_clock_pairing(vcpu, a0, a1)
    if nr == KVM_HC_SEND_IPI and guest_pv_has(vcpu, KVM_FEATURE_PV_SEND_IPI):
        return kvm_pv_send_ipi(vcpu, a0, a1, a2, a3, 64 if op_64_bit else 32)
    if nr == KVM_HC_SCHED_YIELD and guest_pv_has(vcpu, KVM_FEATURE_PV_SCHED_YIELD):
        return 0  # the other processor to yield to does not exist
    if nr == KVM_HC_MAP_GPA_RANGE and vcpu.options.hypercall_exits:
        return _map_gpa_range(vcpu, a0, a1, a2, op_64_bit=op_64_bit)
    return -KVM_ENOSYS


def _kvm_pv_clock_pairing(vcpu: Vcpu, gpa: int, clock_type: int) -> int:
    """Store the host's wall clock together with the TSC; time stands still at the epoch."""
    if clock_type != _CLOCK_PAIRING_WALLCLOCK:
        return -KVM_EOPNOTSUPP
    pairing = _CLOCK_PAIRING.pack(0, 0, vcpu.msrs.get(MSR_IA32_TSC, 0), 0)
    return 0 if vcpu.hooks.write_phys(gpa, pairing) else -KVM_EFAULT


def _map_gpa_range(vcpu: Vcpu, gpa: int, npages: int, attrs: int, *, op_64_bit: bool) -> int:
    """Pages become private or shared, which userspace does."""
    gfn = gpa >> _PAGE_SHIFT
    if gpa & _PAGE_MASK or not npages or gfn + npages & _MASK64 <= gfn:
        return -KVM_EINVAL
    flags = KVM_EXIT_HYPERCALL_LONG_MODE if op_64_bit else 0
    vcpu.run.leave(KVM_EXIT_HYPERCALL, nr=KVM_HC_MAP_GPA_RANGE, args=[gpa, npages, attrs], flags=flags, ret=0)
    vcpu.complete_userspace_io = complete_hypercall_exit
    return 0


def complete_hypercall_exit(vcpu: Vcpu) -> int:
    """Userspace has answered a hypercall: `run.data["ret"]` is the guest's result."""
    return _finish(vcpu, vcpu.run.data["ret"])
