"""Segment and table registers of a vCPU, read through the segment cache.

KVM: vmx_segment_cache_test_set, vmx_get_segment, __vmx_set_segment, vmx_get_cpl, fix_rmode_seg,
vmx_get_gdt. SDM Vol. 3C 24.4.1 "Guest Register State". `vmx_set_segment`, which also decides
whether the new state can be entered, is in `emufuzz.kvm.guest_state`.
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
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.regs import is_long_mode
from emufuzz.kvm.vcpu import VCPU_EXREG_SEGMENTS, KvmSegment, Vcpu, is_unrestricted_guest
from emufuzz.kvm.vmx_bits import VMX_AR_UNUSABLE

SEG_FIELD_SEL: Final = 0
SEG_FIELD_BASE: Final = 1
SEG_FIELD_LIMIT: Final = 2
SEG_FIELD_AR: Final = 3

_SEGMENTS: Final = 1 << VCPU_EXREG_SEGMENTS

#: VCPU_SREG_* -> fields of selector, base, limit, access rights; the VMCS has LDTR before TR.
KVM_VMX_SEGMENT_FIELDS: Final = {
    VCPU_SREG_ES: (vf.GUEST_ES_SELECTOR, vf.GUEST_ES_BASE, vf.GUEST_ES_LIMIT, vf.GUEST_ES_AR_BYTES),
    VCPU_SREG_CS: (vf.GUEST_CS_SELECTOR, vf.GUEST_CS_BASE, vf.GUEST_CS_LIMIT, vf.GUEST_CS_AR_BYTES),
    VCPU_SREG_SS: (vf.GUEST_SS_SELECTOR, vf.GUEST_SS_BASE, vf.GUEST_SS_LIMIT, vf.GUEST_SS_AR_BYTES),
    VCPU_SREG_DS: (vf.GUEST_DS_SELECTOR, vf.GUEST_DS_BASE, vf.GUEST_DS_LIMIT, vf.GUEST_DS_AR_BYTES),
    VCPU_SREG_FS: (vf.GUEST_FS_SELECTOR, vf.GUEST_FS_BASE, vf.GUEST_FS_LIMIT, vf.GUEST_FS_AR_BYTES),
    VCPU_SREG_GS: (vf.GUEST_GS_SELECTOR, vf.GUEST_GS_BASE, vf.GUEST_GS_LIMIT, vf.GUEST_GS_AR_BYTES),
    VCPU_SREG_TR: (vf.GUEST_TR_SELECTOR, vf.GUEST_TR_BASE, vf.GUEST_TR_LIMIT, vf.GUEST_TR_AR_BYTES),
    VCPU_SREG_LDTR: (
        vf.GUEST_LDTR_SELECTOR, vf.GUEST_LDTR_BASE, vf.GUEST_LDTR_LIMIT, vf.GUEST_LDTR_AR_BYTES,
    ),
}  # fmt: skip
#: The same by cache slot, 4 * segment + SEG_FIELD_*.
SEGMENT_FIELDS: Final = tuple(field for seg in range(8) for field in KVM_VMX_SEGMENT_FIELDS[seg])


def vmx_segment_cache_clear(vcpu: Vcpu) -> None:
    """Forget all cached segment fields."""
    vcpu.segment_cache_bitmask = 0


def vmx_read_guest_seg(vcpu: Vcpu, seg: int, field: int) -> int:
    """One field (SEG_FIELD_*) of a segment, from the VMCS at most once (KVM: vmx_read_guest_seg_*)."""
    if not vcpu.regs_avail & _SEGMENTS:
        vcpu.regs_avail |= _SEGMENTS
        vcpu.segment_cache_bitmask = 0
    slot = seg * 4 + field
    if not vcpu.segment_cache_bitmask >> slot & 1:
        vcpu.segment_cache_bitmask |= 1 << slot
        vcpu.segment_cache[slot] = vcpu.vmcs.values[SEGMENT_FIELDS[slot]]
    return vcpu.segment_cache[slot]


def segment_fields(vcpu: Vcpu) -> tuple[int, ...]:
    """All of SEGMENT_FIELDS as `vmx_read_guest_seg` gives them; nothing is cached by that."""
    values = vcpu.vmcs.values
    cached = vcpu.segment_cache_bitmask if vcpu.regs_avail & _SEGMENTS else 0
    if not cached:
        return tuple(map(values.__getitem__, SEGMENT_FIELDS))
    return tuple(
        vcpu.segment_cache[slot] if cached >> slot & 1 else values[field]
        for slot, field in enumerate(SEGMENT_FIELDS)
    )


def vmx_get_segment(vcpu: Vcpu, seg: int) -> KvmSegment:
    """A segment register as the guest sees it, a copy of its own."""
    if vcpu.rmode.vm86_active and seg != VCPU_SREG_LDTR:
        return _rmode_segment(vcpu, seg)
    ar = vmx_read_guest_seg(vcpu, seg, SEG_FIELD_AR)
    unusable = ar >> 16 & 1
    return KvmSegment(
        selector=vmx_read_guest_seg(vcpu, seg, SEG_FIELD_SEL),
        base=vmx_read_guest_seg(vcpu, seg, SEG_FIELD_BASE),
        limit=vmx_read_guest_seg(vcpu, seg, SEG_FIELD_LIMIT),
        type=ar & 15,
        s=ar >> 4 & 1,
        dpl=ar >> 5 & 3,
        present=1 - unusable,
        avl=ar >> 12 & 1,
        l=ar >> 13 & 1,
        db=ar >> 14 & 1,
        g=ar >> 15 & 1,
        unusable=unusable,
    )


def _rmode_segment(vcpu: Vcpu, seg: int) -> KvmSegment:
    """In the vm86 stand-in the saved segment counts, unless the guest has loaded a selector since."""
    var = vcpu.rmode.segs[seg].copy()
    if seg == VCPU_SREG_TR:
        return var
    selector = vmx_read_guest_seg(vcpu, seg, SEG_FIELD_SEL)
    if var.selector != selector:
        var.base = vmx_read_guest_seg(vcpu, seg, SEG_FIELD_BASE)
        var.selector = selector
    return var


def get_segment_base(vcpu: Vcpu, seg: int) -> int:
    """The 64-bit base of a segment (KVM: vmx_get_segment_base)."""
    if vcpu.rmode.vm86_active:
        return vmx_get_segment(vcpu, seg).base
    return vmx_read_guest_seg(vcpu, seg, SEG_FIELD_BASE)


def vmx_get_cpl(vcpu: Vcpu) -> int:
    """CPL: SS.DPL, 0 in the vm86 stand-in for real mode (SDM Vol. 3C 24.4.1)."""
    if vcpu.rmode.vm86_active:
        return 0
    return vmx_read_guest_seg(vcpu, VCPU_SREG_SS, SEG_FIELD_AR) >> 5 & 3


def vmx_get_cs_db_l_bits(vcpu: Vcpu) -> tuple[int, int]:
    """CS.D and CS.L."""
    ar = vmx_read_guest_seg(vcpu, VCPU_SREG_CS, SEG_FIELD_AR)
    return ar >> 14 & 1, ar >> 13 & 1


def is_64_bit_mode(vcpu: Vcpu) -> bool:
    """Long mode with CS.L."""
    return is_long_mode(vcpu) and bool(vmx_get_cs_db_l_bits(vcpu)[1])


def vmx_segment_access_rights(var: KvmSegment) -> int:
    """A segment's access-rights field; what is not present is unusable."""
    return (
        var.type & 15
        | (var.s & 1) << 4
        | (var.dpl & 3) << 5
        | (var.present & 1) << 7
        | (var.avl & 1) << 12
        | (var.l & 1) << 13
        | (var.db & 1) << 14
        | (var.g & 1) << 15
        | (VMX_AR_UNUSABLE if var.unusable or not var.present else 0)
    )


def set_segment_raw(vcpu: Vcpu, var: KvmSegment, seg: int) -> None:
    """Store a segment register (KVM: __vmx_set_segment).

    KVM deviation: with unrestricted guest the accessed bit is set, and it stays set, also in a
    segment that is unusable.
    """
    vmx_segment_cache_clear(vcpu)
    if vcpu.rmode.vm86_active and seg != VCPU_SREG_LDTR:
        vcpu.rmode.segs[seg] = var.copy()
        if seg == VCPU_SREG_TR:
            vcpu.vmcs.write(vf.GUEST_TR_SELECTOR, var.selector)
        elif var.s:
            fix_rmode_seg(vcpu, seg, var)
        return
    if is_unrestricted_guest(vcpu) and seg != VCPU_SREG_LDTR:
        var.type |= 1
    _write_fields(vcpu, seg, var)


def _write_fields(vcpu: Vcpu, seg: int, var: KvmSegment) -> None:
    selector, base, limit, ar = KVM_VMX_SEGMENT_FIELDS[seg]
    write = vcpu.vmcs.write
    write(selector, var.selector)
    write(base, var.base)
    write(limit, var.limit)
    write(ar, vmx_segment_access_rights(var))


def fix_rmode_seg(vcpu: Vcpu, seg: int, save: KvmSegment) -> None:
    """Give hardware the vm86 form of a real-mode segment; `save` keeps the guest's."""
    var = save.copy()
    var.dpl = 3
    if seg == VCPU_SREG_CS:
        var.type = 3
    if not vcpu.options.emulate_invalid_guest_state:
        var = KvmSegment(
            selector=save.base >> 4,
            base=save.base & 0xFFFF0,
            limit=0xFFFF,
            type=3,
            s=1,
            dpl=3,
            present=1,
        )
    _write_fields(vcpu, seg, var)


def vmx_get_gdt(vcpu: Vcpu) -> tuple[int, int]:
    """GDTR as (base, limit)."""
    return vcpu.vmcs.values[vf.GUEST_GDTR_BASE], vcpu.vmcs.values[vf.GUEST_GDTR_LIMIT]


def vmx_set_gdt(vcpu: Vcpu, base: int, limit: int) -> None:
    """Store GDTR; the limit has 16 bits (struct desc_ptr)."""
    vcpu.vmcs.write(vf.GUEST_GDTR_LIMIT, limit & 0xFFFF)
    vcpu.vmcs.write(vf.GUEST_GDTR_BASE, base)


def vmx_get_idt(vcpu: Vcpu) -> tuple[int, int]:
    """IDTR as (base, limit)."""
    return vcpu.vmcs.values[vf.GUEST_IDTR_BASE], vcpu.vmcs.values[vf.GUEST_IDTR_LIMIT]


def vmx_set_idt(vcpu: Vcpu, base: int, limit: int) -> None:
    """Store IDTR; the limit has 16 bits (struct desc_ptr)."""
    vcpu.vmcs.write(vf.GUEST_IDTR_LIMIT, limit & 0xFFFF)
    vcpu.vmcs.write(vf.GUEST_IDTR_BASE, base)
