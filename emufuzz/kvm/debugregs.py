"""Debug registers, breakpoints on code, single step, and userspace's debugger.

KVM: kvm_set_dr, kvm_get_dr, kvm_update_dr7, kvm_vcpu_check_hw_bp, kvm_vcpu_check_code_breakpoint,
kvm_vcpu_do_singlestep, kvm_arch_vcpu_ioctl_set_guest_debug. SDM Vol. 3B 17.2 "Debug Registers".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from emufuzz.arch.exceptions import BP_VECTOR, DB_VECTOR
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exceptions import (
    DR6_ACTIVE_LOW,
    DR6_BS,
    DR6_FIXED_1,
    DR6_RTM,
    DR6_VOLATILE,
    kvm_is_exception_pending,
    kvm_queue_exception,
    kvm_queue_exception_p,
)
from emufuzz.kvm.rflags import (
    KVM_GUESTDBG_ENABLE,
    KVM_GUESTDBG_INJECT_BP,
    KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    kvm_get_linear_rip,
    kvm_get_rflags,
    kvm_set_rflags,
)
from emufuzz.kvm.rmode import vmx_update_exception_bitmap
from emufuzz.kvm.vcpu import KVM_EXIT_DEBUG, Vcpu
from emufuzz.kvm.vmx_bits import GUEST_INTR_STATE_MOV_SS

DR6_BUS_LOCK: Final = 1 << 11
DR6_BD: Final = 1 << 13
DR7_BP_EN_MASK: Final = 0xFF
DR7_GD: Final = 1 << 13
DR7_FIXED_1: Final = 1 << 10
DR7_VOLATILE: Final = 0xFFFF2BFF

_EXECUTE: Final = 0  # R/W and LEN of a breakpoint on instructions


def kvm_dr6_fixed(vcpu: Vcpu) -> int:
    """DR6 bits that the guest cannot clear: RTM and BLD only without the feature."""
    fixed = DR6_FIXED_1
    if not vcpu.cpuid.has("rtm"):
        fixed |= DR6_RTM
    if not vcpu.cpuid.has("bus_lock_detect"):
        fixed |= DR6_BUS_LOCK
    return fixed


def kvm_set_dr(vcpu: Vcpu, dr: int, val: int) -> int:
    """Store DR `dr` (0..7, 4 and 5 being 6 and 7); 1 if DR6 or DR7 gets bits above 31."""
    if dr < 4:
        vcpu.db[dr] = val
        if not vcpu.guest_debug & KVM_GUESTDBG_USE_HW_BP:
            vcpu.eff_db[dr] = val
        return 0
    if val >> 32:
        return 1
    if dr in (4, 6):
        vcpu.dr6 = val & DR6_VOLATILE | kvm_dr6_fixed(vcpu)
    else:
        vcpu.dr7 = val & DR7_VOLATILE | DR7_FIXED_1
        kvm_update_dr7(vcpu)
    return 0


def kvm_get_dr(vcpu: Vcpu, dr: int) -> int:
    """DR `dr` (0..7, 4 and 5 being 6 and 7)."""
    if dr < 4:
        return vcpu.db[dr]
    return vcpu.dr6 if dr in (4, 6) else vcpu.dr7


def kvm_update_dr7(vcpu: Vcpu) -> None:
    """Give hardware the DR7 in force, the debugging userspace's if that uses breakpoints."""
    hardware = vcpu.guest_debug_dr7 if vcpu.guest_debug & KVM_GUESTDBG_USE_HW_BP else vcpu.dr7
    vcpu.vmcs.write(vf.GUEST_DR7, hardware)


def kvm_vcpu_check_hw_bp(addr: int, kind: int, dr7: int, db: Sequence[int]) -> int:
    """The DR6 bits of the enabled breakpoints of a kind (R/W | LEN << 2) at exactly this address."""
    dr6 = 0
    for i in range(4):
        if dr7 >> 2 * i & 3 and dr7 >> 16 + 4 * i & 15 == kind and db[i] == addr:
            dr6 |= 1 << i
    return dr6


def _is_code_breakpoint_inhibited(vcpu: Vcpu) -> bool:
    """RF, and on Intel compatible guests the MOV SS shadow, hold code breakpoints back."""
    if kvm_get_rflags(vcpu) & X86_EFLAGS_RF:
        return True
    if not vcpu.cpuid.intel_compatible:
        return False
    return bool(vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & GUEST_INTR_STATE_MOV_SS)


def kvm_vcpu_check_code_breakpoint(vcpu: Vcpu) -> int | None:
    """Whether a breakpoint stops the instruction at RIP before it is emulated.

    The caller leaves the check out for the EMULTYPE_* where hardware has made it.

    Returns:
        None if none does; 0 for KVM_EXIT_DEBUG; 1 if #DB is queued.
    """
    if vcpu.guest_debug & KVM_GUESTDBG_USE_HW_BP and vcpu.guest_debug_dr7 & DR7_BP_EN_MASK:
        rip = kvm_get_linear_rip(vcpu)
        dr6 = kvm_vcpu_check_hw_bp(rip, _EXECUTE, vcpu.guest_debug_dr7, vcpu.eff_db)
        if dr6:
            vcpu.run.leave(KVM_EXIT_DEBUG, dr6=dr6 | DR6_ACTIVE_LOW, pc=rip, exception=DB_VECTOR)
            return 0
    if vcpu.dr7 & DR7_BP_EN_MASK and not _is_code_breakpoint_inhibited(vcpu):
        dr6 = kvm_vcpu_check_hw_bp(kvm_get_linear_rip(vcpu), _EXECUTE, vcpu.dr7, vcpu.db)
        if dr6:
            kvm_queue_exception_p(vcpu, DB_VECTOR, dr6)
            return 1
    return None


def kvm_vcpu_do_singlestep(vcpu: Vcpu) -> int:
    """An instruction ended with TF: 0 and KVM_EXIT_DEBUG for userspace's step, else 1 and #DB."""
    if vcpu.guest_debug & KVM_GUESTDBG_SINGLESTEP:
        rip = kvm_get_linear_rip(vcpu)
        vcpu.run.leave(KVM_EXIT_DEBUG, dr6=DR6_BS | DR6_ACTIVE_LOW, pc=rip, exception=DB_VECTOR)
        return 0
    kvm_queue_exception_p(vcpu, DB_VECTOR, DR6_BS)
    return 1


def kvm_set_guest_debug(vcpu: Vcpu, control: int, debugreg: Sequence[int] = (0,) * 8) -> bool:
    """Userspace's debugger takes hold (ioctl KVM_SET_GUEST_DEBUG).

    Args:
        vcpu: the vCPU.
        control: KVM_GUESTDBG_* bits; without ENABLE nothing stays on.
        debugreg: DR0..DR7 for USE_HW_BP.

    Returns:
        False if an event is to be injected while one is pending already (EBUSY).
    """
    if control & (KVM_GUESTDBG_INJECT_DB | KVM_GUESTDBG_INJECT_BP):
        if kvm_is_exception_pending(vcpu):
            return False
        kvm_queue_exception(vcpu, DB_VECTOR if control & KVM_GUESTDBG_INJECT_DB else BP_VECTOR)
    rflags = kvm_get_rflags(vcpu)
    vcpu.guest_debug = control if control & KVM_GUESTDBG_ENABLE else 0
    if vcpu.guest_debug & KVM_GUESTDBG_USE_HW_BP:
        vcpu.eff_db = list(debugreg[:4])
        vcpu.guest_debug_dr7 = debugreg[7]
    else:
        vcpu.eff_db = list(vcpu.db)
    kvm_update_dr7(vcpu)
    if vcpu.guest_debug & KVM_GUESTDBG_SINGLESTEP:
        vcpu.singlestep_rip = kvm_get_linear_rip(vcpu)
    kvm_set_rflags(vcpu, rflags)
    vmx_update_exception_bitmap(vcpu)
    return True
