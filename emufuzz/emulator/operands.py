"""Operand decoding: one decoder per operand kind of the opcode tables.

emulate.c: decode_operand, decode_imm, decode_register_operand, fetch_bit_operand.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator import flags as f
from emufuzz.emulator.access import ADDRESS_MASK
from emufuzz.emulator.ctxt import Operand, X86EmulateCtxt, reg_read
from emufuzz.emulator.fetch import do_insn_fetch_bytes, insn_fetch, insn_fetch_signed
from emufuzz.emulator.flags import BitOp, ByteOp, Mmx, ModRM, Sse
from emufuzz.emulator.modrm import set_byte_register, set_register, set_vector_register
from emufuzz.emulator.opcode import OperandDecoder
from emufuzz.emulator.x86emul import (
    MASK64,
    OPERAND_IMM,
    OPERAND_MEM,
    OPERAND_NONE,
    OPERAND_REG,
    X86EMUL_CONTINUE,
)

SREG_ES: Final = 0
RAX: Final = 0
RCX: Final = 1
RDX: Final = 2
RBX: Final = 3
RSI: Final = 6
RDI: Final = 7


def _reg(ctxt: X86EmulateCtxt, op: Operand) -> int:
    d = ctxt.d
    reg = ctxt.modrm_reg if d & ModRM else ctxt.b & 7 | (ctxt.rex_prefix & 1) << 3
    if d & (Sse | Mmx):
        set_vector_register(ctxt, op, reg)
    elif d & ByteOp:
        set_byte_register(ctxt, op, reg)
    else:
        set_register(ctxt, op, reg, ctxt.op_bytes)
    return X86EMUL_CONTINUE


def _copy_memop(ctxt: X86EmulateCtxt, op: Operand) -> int:
    memop = ctxt.memop
    op.type = memop.type
    op.bytes = memop.bytes
    op.val = op.orig_val = memop.val
    op.reg = memop.reg
    op.shift = memop.shift
    op.ea = memop.ea
    op.seg = memop.seg
    op.count = memop.count
    ctxt.memopp = op
    if ctxt.d & BitOp:
        _fetch_bit_operand(ctxt)
        op.orig_val = op.val
    return X86EMUL_CONTINUE


def _fetch_bit_operand(ctxt: X86EmulateCtxt) -> None:
    """A register bit offset reaches beyond the operand: move the address, keep the offset's low bits."""
    src, dst = ctxt.src, ctxt.dst
    bits = dst.bytes * 8
    if dst.type == OPERAND_MEM and src.type == OPERAND_REG:
        offset = src.val
        if offset >> (src.bytes * 8 - 1):
            offset -= 1 << src.bytes * 8
        dst.ea = dst.ea + ((offset & ~(bits - 1)) >> 3) & ADDRESS_MASK[ctxt.ad_bytes]
    src.val &= bits - 1


def _mem(ctxt: X86EmulateCtxt, op: Operand) -> int:
    ctxt.memop.bytes = 1 if ctxt.d & ByteOp else ctxt.op_bytes
    return _copy_memop(ctxt, op)


def _mem8(ctxt: X86EmulateCtxt, op: Operand) -> int:
    if ctxt.memop.type == OPERAND_REG:
        set_byte_register(ctxt, ctxt.memop, ctxt.modrm_rm)
    ctxt.memop.bytes = 1
    return _copy_memop(ctxt, op)


def _mem_sized(size: int) -> OperandDecoder:
    """A memory operand of fixed size. A register form keeps the value read at operand size."""

    def decode(ctxt: X86EmulateCtxt, op: Operand) -> int:
        ctxt.memop.bytes = size
        return _copy_memop(ctxt, op)

    return decode


def _mem64(ctxt: X86EmulateCtxt, op: Operand) -> int:
    ctxt.memop.bytes = 16 if ctxt.op_bytes == 8 else 8
    return _copy_memop(ctxt, op)


def _mem_faddr(ctxt: X86EmulateCtxt, op: Operand) -> int:
    ctxt.memop.bytes = ctxt.op_bytes + 2
    return _copy_memop(ctxt, op)


def _acc(ctxt: X86EmulateCtxt, op: Operand) -> int:
    set_register(ctxt, op, RAX, 1 if ctxt.d & ByteOp else ctxt.op_bytes)
    return X86EMUL_CONTINUE


def _acc_lo(ctxt: X86EmulateCtxt, op: Operand) -> int:
    set_register(ctxt, op, RAX, 2 if ctxt.d & ByteOp else ctxt.op_bytes)
    return X86EMUL_CONTINUE


def _acc_hi(ctxt: X86EmulateCtxt, op: Operand) -> int:
    if ctxt.d & ByteOp:
        op.type = OPERAND_NONE
    else:
        set_register(ctxt, op, RDX, ctxt.op_bytes)
    return X86EMUL_CONTINUE


def _dx(ctxt: X86EmulateCtxt, op: Operand) -> int:
    set_register(ctxt, op, RDX, 2)
    return X86EMUL_CONTINUE


def _cl(ctxt: X86EmulateCtxt, op: Operand) -> int:
    op.type = OPERAND_IMM
    op.bytes = 1
    op.val = reg_read(ctxt, RCX) & 0xFF
    return X86EMUL_CONTINUE


def _one(ctxt: X86EmulateCtxt, op: Operand) -> int:  # noqa: ARG001 - the shape of an operand decoder
    op.type = OPERAND_IMM
    op.bytes = 1
    op.val = 1
    return X86EMUL_CONTINUE


def _string_operand(ctxt: X86EmulateCtxt, op: Operand, reg: int, seg: int) -> int:
    op.type = OPERAND_MEM
    op.bytes = 1 if ctxt.d & ByteOp else ctxt.op_bytes
    op.ea = reg_read(ctxt, reg) & ADDRESS_MASK[ctxt.ad_bytes]
    op.seg = seg
    op.val = 0
    op.count = 1
    return X86EMUL_CONTINUE


def _si(ctxt: X86EmulateCtxt, op: Operand) -> int:
    return _string_operand(ctxt, op, RSI, ctxt.seg_override)


def _di(ctxt: X86EmulateCtxt, op: Operand) -> int:
    return _string_operand(ctxt, op, RDI, SREG_ES)


def _xlat(ctxt: X86EmulateCtxt, op: Operand) -> int:
    op.type = OPERAND_MEM
    op.bytes = 1 if ctxt.d & ByteOp else ctxt.op_bytes
    op.ea = reg_read(ctxt, RBX) + (reg_read(ctxt, RAX) & 0xFF) & ADDRESS_MASK[ctxt.ad_bytes]
    op.seg = ctxt.seg_override
    op.val = 0
    return X86EMUL_CONTINUE


def _immediate(ctxt: X86EmulateCtxt, op: Operand, size: int, signed: bool) -> int:
    op.type = OPERAND_IMM
    op.bytes = size
    ctxt.rc = X86EMUL_CONTINUE
    if signed:
        op.val = insn_fetch_signed(ctxt, size) & MASK64
    else:
        op.val = insn_fetch(ctxt, size)
    return ctxt.rc


def _imm(ctxt: X86EmulateCtxt, op: Operand) -> int:
    size = 1 if ctxt.d & ByteOp else ctxt.op_bytes
    return _immediate(ctxt, op, 4 if size == 8 else size, signed=True)


def _imm64(ctxt: X86EmulateCtxt, op: Operand) -> int:
    return _immediate(ctxt, op, ctxt.op_bytes, signed=True)


def _imm_byte(ctxt: X86EmulateCtxt, op: Operand) -> int:
    return _immediate(ctxt, op, 1, signed=True)


def _imm_u_byte(ctxt: X86EmulateCtxt, op: Operand) -> int:
    return _immediate(ctxt, op, 1, signed=False)


def _imm_u16(ctxt: X86EmulateCtxt, op: Operand) -> int:
    return _immediate(ctxt, op, 2, signed=False)


def _imm_faddr(ctxt: X86EmulateCtxt, op: Operand) -> int:
    """A far pointer: offset of operand size, then selector, as one value."""
    op.type = OPERAND_IMM
    op.bytes = size = ctxt.op_bytes + 2
    pos = ctxt.fetch_pos
    missing = pos + size - len(ctxt.fetch_data)
    if missing > 0:
        rc = do_insn_fetch_bytes(ctxt, missing)
        if rc != X86EMUL_CONTINUE:
            return rc
    op.val = int.from_bytes(ctxt.fetch_data[pos : pos + size], "little")
    ctxt.fetch_pos = pos + size
    return X86EMUL_CONTINUE


def _segment_register(seg: int) -> OperandDecoder:
    """An operand whose value is the number of a segment register."""

    def decode(ctxt: X86EmulateCtxt, op: Operand) -> int:  # noqa: ARG001 - as above
        op.type = OPERAND_IMM
        op.val = seg
        return X86EMUL_CONTINUE

    return decode


#: Operand kind -> its decoder; kinds that are absent (None, Implicit) take part in no writeback.
OPERAND_DECODERS: Final[dict[int, OperandDecoder]] = {
    f.OP_REG: _reg,
    f.OP_MEM: _mem,
    f.OP_ACC: _acc,
    f.OP_DI: _di,
    f.OP_MEM64: _mem64,
    f.OP_IMMUBYTE: _imm_u_byte,
    f.OP_DX: _dx,
    f.OP_CL: _cl,
    f.OP_IMMBYTE: _imm_byte,
    f.OP_ONE: _one,
    f.OP_IMM: _imm,
    f.OP_MEM16: _mem_sized(2),
    f.OP_MEM32: _mem_sized(4),
    f.OP_SI: _si,
    f.OP_IMMFADDR: _imm_faddr,
    f.OP_MEMFADDR: _mem_faddr,
    f.OP_IMMU16: _imm_u16,
    f.OP_ES: _segment_register(0),
    f.OP_CS: _segment_register(1),
    f.OP_SS: _segment_register(2),
    f.OP_DS: _segment_register(3),
    f.OP_FS: _segment_register(4),
    f.OP_GS: _segment_register(5),
    f.OP_MEM8: _mem8,
    f.OP_IMM64: _imm64,
    f.OP_XLAT: _xlat,
    f.OP_ACCLO: _acc_lo,
    f.OP_ACCHI: _acc_hi,
}
