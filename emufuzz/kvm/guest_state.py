"""Can hardware enter this guest state? If not, KVM must emulate (`emulation_required`).

KVM: __vmx_guest_state_valid and its parts, vmx_emulation_required, vmx_set_segment.
SDM Vol. 3C 26.3.1.2 "Checks on Guest Segment Registers".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.arch.rflags import X86_EFLAGS_VM
from emufuzz.kvm.regs import is_protmode
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import set_segment_raw, vmx_get_segment, vmx_segment_access_rights
from emufuzz.kvm.vcpu import KvmSegment, Vcpu, is_unrestricted_guest
from emufuzz.kvm.vmx_bits import (
    VMX_AR_TYPE_ACCESSES_MASK,
    VMX_AR_TYPE_CODE_MASK,
    VMX_AR_TYPE_WRITEABLE_MASK,
)

_RPL: Final = 3
_TI: Final = 4
_RMODE_AR: Final = 0xF3
_DATA_SEGMENTS: Final = (VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_FS, VCPU_SREG_GS)
_RMODE_SEGMENTS: Final = (VCPU_SREG_CS, VCPU_SREG_SS, *_DATA_SEGMENTS)


def vmx_emulation_required(vcpu: Vcpu) -> bool:
    """The guest state cannot be entered, and KVM may emulate until it can."""
    return vcpu.options.emulate_invalid_guest_state and not vmx_guest_state_valid(vcpu)


def vmx_guest_state_valid(vcpu: Vcpu) -> bool:
    """An unrestricted guest can always be entered, as far as KVM checks."""
    return is_unrestricted_guest(vcpu) or guest_state_valid(vcpu)


def guest_state_valid(vcpu: Vcpu) -> bool:
    """The segments suit VM entry without unrestricted guest (KVM: __vmx_guest_state_valid)."""
    if not is_protmode(vcpu) or vmx_get_rflags(vcpu) & X86_EFLAGS_VM:
        return all(rmode_segment_valid(vmx_get_segment(vcpu, seg), seg) for seg in _RMODE_SEGMENTS)
    cs, ss = vmx_get_segment(vcpu, VCPU_SREG_CS), vmx_get_segment(vcpu, VCPU_SREG_SS)
    return (
        cs.selector & _RPL == ss.selector & _RPL
        and code_segment_valid(cs)
        and stack_segment_valid(ss)
        and all(data_segment_valid(vmx_get_segment(vcpu, seg)) for seg in _DATA_SEGMENTS)
        and tr_valid(vmx_get_segment(vcpu, VCPU_SREG_TR))
        and ldtr_valid(vmx_get_segment(vcpu, VCPU_SREG_LDTR))
    )


def rmode_segment_valid(var: KvmSegment, seg: int) -> bool:
    """A segment of real or virtual-8086 mode; DPL 3 and, in CS, type 3 are taken for granted."""
    var = var.copy()
    var.dpl = 3
    if seg == VCPU_SREG_CS:
        var.type = 3
    return (
        var.base == var.selector << 4 and var.limit == 0xFFFF and vmx_segment_access_rights(var) == _RMODE_AR
    )


def code_segment_valid(cs: KvmSegment) -> bool:
    """CS of protected mode: usable accessed code; conforming code allows a lower DPL than RPL."""
    rpl = cs.selector & _RPL
    if cs.unusable or ~cs.type & (VMX_AR_TYPE_CODE_MASK | VMX_AR_TYPE_ACCESSES_MASK) or not cs.s:
        return False
    if cs.type & VMX_AR_TYPE_WRITEABLE_MASK:
        if cs.dpl > rpl:
            return False
    elif cs.dpl != rpl:
        return False
    return bool(cs.present)


def stack_segment_valid(ss: KvmSegment) -> bool:
    """SS of protected mode: unusable, or accessed writable data with DPL = RPL."""
    if ss.unusable:
        return True
    return ss.type in (3, 7) and bool(ss.s) and ss.dpl == ss.selector & _RPL and bool(ss.present)


def data_segment_valid(var: KvmSegment) -> bool:
    """DS, ES, FS, GS of protected mode: unusable, or DPL >= RPL unless conforming code."""
    if var.unusable:
        return True
    if not var.s or not var.present:
        return False
    conforming = not ~var.type & (VMX_AR_TYPE_CODE_MASK | VMX_AR_TYPE_WRITEABLE_MASK)
    return conforming or var.dpl >= var.selector & _RPL


def tr_valid(tr: KvmSegment) -> bool:
    """TR: a busy TSS from the GDT.

    KVM deviation: a 16-bit TSS passes in long mode as well (SDM Vol. 3C 26.3.1.2).
    """
    return not tr.unusable and not tr.selector & _TI and tr.type in (3, 11) and bool(tr.present)


def ldtr_valid(ldtr: KvmSegment) -> bool:
    """LDTR: unusable, or an LDT from the GDT."""
    if ldtr.unusable:
        return True
    return not ldtr.selector & _TI and ldtr.type == 2 and bool(ldtr.present)


def vmx_set_segment(vcpu: Vcpu, var: KvmSegment, seg: int) -> None:
    """Store a segment register and find out whether the guest can still be entered."""
    set_segment_raw(vcpu, var, seg)
    vcpu.emulation_required = vmx_emulation_required(vcpu)
