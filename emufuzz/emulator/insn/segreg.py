"""Segment and descriptor-table registers (SDM Vol. 2: MOV Sreg, LDS .. LSS, LLDT, LTR, LGDT, SGDT ...).

emulate.c: em_mov_sreg_rm, em_pop_sreg, em_lseg, em_lldt, em_ltr, em_sldt, em_str, em_lgdt_lidt,
emulate_store_desc_ptr.
"""

from __future__ import annotations

from emufuzz.arch.cr import X86_CR4_UMIP
from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_GS,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.emulator.access import (
    emulate_pop,
    rsp_increment,
    segmented_read_std,
    segmented_write_std,
)
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.faults import emulate_gp, emulate_ud
from emufuzz.emulator.segments import get_segment_selector, load_segment_descriptor
from emufuzz.emulator.x86emul import (
    KVM_X86_SHADOW_INT_MOV_SS,
    MASK16,
    MASK64,
    OPERAND_MEM,
    OPERAND_NONE,
    X86EMUL_CONTINUE,
    X86EMUL_F_DT_LOAD,
    X86EMUL_MODE_PROT64,
)


def umip_forbids(ctxt: X86EmulateCtxt) -> bool:
    """CR4.UMIP hides SGDT, SIDT, SLDT, STR and SMSW from user code (SDM Vol. 3A 2.5)."""
    return bool(ctxt.ops.get_cr(ctxt, 4) & X86_CR4_UMIP) and ctxt.ops.cpl(ctxt) > 0


def em_store_sreg(ctxt: X86EmulateCtxt, seg: int) -> int:
    """Store a selector into ctxt.dst.

    KVM deviation: with REX.W the memory form stores 8 bytes (SDM Vol. 2B MOV: always 16 bits).
    """
    if seg > VCPU_SREG_GS and umip_forbids(ctxt):
        return emulate_gp(ctxt, 0)
    dst = ctxt.dst
    dst.val = get_segment_selector(ctxt, seg)
    if dst.bytes == 4 and dst.type == OPERAND_MEM:
        dst.bytes = 2
    return X86EMUL_CONTINUE


def em_mov_rm_sreg(ctxt: X86EmulateCtxt) -> int:
    """MOV r/m, Sreg (8C)."""
    if ctxt.modrm_reg > VCPU_SREG_GS:
        return emulate_ud(ctxt)
    return em_store_sreg(ctxt, ctxt.modrm_reg)


def em_sldt(ctxt: X86EmulateCtxt) -> int:
    """SLDT r/m.

    KVM deviation: a memory destination is read first (SDM Vol. 2B SLDT only writes).
    """
    return em_store_sreg(ctxt, VCPU_SREG_LDTR)


def em_str(ctxt: X86EmulateCtxt) -> int:
    """STR r/m.

    KVM deviation: a memory destination is read first (SDM Vol. 2B STR only writes).
    """
    return em_store_sreg(ctxt, VCPU_SREG_TR)


def em_mov_sreg_rm(ctxt: X86EmulateCtxt) -> int:
    """MOV Sreg, r/m (8E).

    KVM deviation: a memory source is read before an invalid register is #UD, and the MOV SS
    shadow is set even if the load then faults (SDM Vol. 2B MOV).
    """
    seg = ctxt.modrm_reg
    if seg == VCPU_SREG_CS or seg > VCPU_SREG_GS:
        return emulate_ud(ctxt)
    if seg == VCPU_SREG_SS:
        ctxt.interruptibility = KVM_X86_SHADOW_INT_MOV_SS
    ctxt.dst.type = OPERAND_NONE
    return load_segment_descriptor(ctxt, ctxt.src.val & MASK16, seg)


def em_pop_sreg(ctxt: X86EmulateCtxt) -> int:
    """POP Sreg: reads 2 bytes of a slot of operand size.

    KVM deviation: the MOV SS shadow is set even if the load then faults (SDM Vol. 2B POP).
    """
    selector = emulate_pop(ctxt, 2)
    if selector < 0:
        return -selector
    seg = ctxt.src2.val
    if seg == VCPU_SREG_SS:
        ctxt.interruptibility = KVM_X86_SHADOW_INT_MOV_SS
    if ctxt.op_bytes > 2:
        rsp_increment(ctxt, ctxt.op_bytes - 2)
    return load_segment_descriptor(ctxt, selector, seg)


def em_lseg(ctxt: X86EmulateCtxt) -> int:
    """LES, LDS, LSS, LFS, LGS: a far pointer into a segment register and a GPR.

    KVM deviation: REX.W makes it a 10-byte pointer for AMD guests too (APM Vol. 3 LDS).
    """
    selector = ctxt.src.val >> ctxt.op_bytes * 8 & MASK16
    rc = load_segment_descriptor(ctxt, selector, ctxt.src2.val)
    if rc == X86EMUL_CONTINUE:
        ctxt.dst.val = ctxt.src.val
    return rc


def em_lldt(ctxt: X86EmulateCtxt) -> int:
    """LLDT r/m16."""
    ctxt.dst.type = OPERAND_NONE
    return load_segment_descriptor(ctxt, ctxt.src.val & MASK16, VCPU_SREG_LDTR)


def em_ltr(ctxt: X86EmulateCtxt) -> int:
    """LTR r/m16."""
    ctxt.dst.type = OPERAND_NONE
    return load_segment_descriptor(ctxt, ctxt.src.val & MASK16, VCPU_SREG_TR)


def _store_desc_ptr(ctxt: X86EmulateCtxt, base: int, limit: int) -> int:
    """Store a table register: limit, then base (KVM: emulate_store_desc_ptr).

    KVM deviation: with a 16-bit operand the top byte of the base is stored as 0 (SDM Vol. 2B SGDT).
    """
    if umip_forbids(ctxt):
        return emulate_gp(ctxt, 0)
    if ctxt.mode == X86EMUL_MODE_PROT64:
        ctxt.op_bytes = 8
    if ctxt.op_bytes == 2:
        ctxt.op_bytes = 4
        base &= 0xFFFFFF
    dst = ctxt.dst
    dst.type = OPERAND_NONE
    data = (limit & MASK16 | base << 16).to_bytes(10, "little")[: 2 + ctxt.op_bytes]
    return segmented_write_std(ctxt, dst.seg, dst.ea, data)


def em_sgdt(ctxt: X86EmulateCtxt) -> int:
    """SGDT m."""
    return _store_desc_ptr(ctxt, *ctxt.ops.get_gdt(ctxt))


def em_sidt(ctxt: X86EmulateCtxt) -> int:
    """SIDT m."""
    return _store_desc_ptr(ctxt, *ctxt.ops.get_idt(ctxt))


def _load_desc_ptr(ctxt: X86EmulateCtxt) -> tuple[int, int, int]:
    """(result, base, limit) of the memory operand (KVM: read_descriptor).

    KVM deviation: limit and base are read by two accesses (SDM Vol. 2A LGDT).
    """
    if ctxt.mode == X86EMUL_MODE_PROT64:
        ctxt.op_bytes = 8
    src = ctxt.src
    rc, data = segmented_read_std(ctxt, src.seg, src.ea, 2)
    if rc != X86EMUL_CONTINUE:
        return rc, 0, 0
    limit = int.from_bytes(data, "little")
    size = 3 if ctxt.op_bytes == 2 else ctxt.op_bytes
    rc, data = segmented_read_std(ctxt, src.seg, src.ea + 2 & MASK64, size)
    if rc != X86EMUL_CONTINUE:
        return rc, 0, 0
    base = int.from_bytes(data, "little")
    if ctxt.mode == X86EMUL_MODE_PROT64 and not ctxt.ops.is_canonical_addr(ctxt, base, X86EMUL_F_DT_LOAD):
        return emulate_gp(ctxt, 0), 0, 0
    ctxt.dst.type = OPERAND_NONE
    return X86EMUL_CONTINUE, base, limit


def em_lgdt(ctxt: X86EmulateCtxt) -> int:
    """LGDT m."""
    rc, base, limit = _load_desc_ptr(ctxt)
    if rc == X86EMUL_CONTINUE:
        ctxt.ops.set_gdt(ctxt, base, limit)
    return rc


def em_lidt(ctxt: X86EmulateCtxt) -> int:
    """LIDT m."""
    rc, base, limit = _load_desc_ptr(ctxt)
    if rc == X86EMUL_CONTINUE:
        ctxt.ops.set_idt(ctxt, base, limit)
    return rc
