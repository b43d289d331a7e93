"""Operand decoding: instruction bytes, ModRM and SIB, immediates, one decoder per operand kind.

emulate.c: __do_insn_fetch_bytes, decode_modrm, decode_abs, decode_imm, decode_operand,
fetch_bit_operand. SDM Vol. 2A 2.1.5, 2.2.1.

Fetch functions return the value (zero or more, or signed where named so) and leave a failure in
ctxt.rc; their callers look there.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emufuzz.emulator.access import ADDRESS_MASK, linearize
from emufuzz.emulator.ctxt import Operand, X86EmulateCtxt, reg_read, reg_rmw
from emufuzz.emulator.faults import emulate_gp
from emufuzz.emulator.flags import (
    OP_ACC,
    OP_ACCHI,
    OP_ACCLO,
    OP_CL,
    OP_CS,
    OP_DI,
    OP_DS,
    OP_DX,
    OP_ES,
    OP_FS,
    OP_GS,
    OP_IMM,
    OP_IMM64,
    OP_IMMBYTE,
    OP_IMMFADDR,
    OP_IMMU16,
    OP_IMMUBYTE,
    OP_MEM,
    OP_MEM8,
    OP_MEM16,
    OP_MEM32,
    OP_MEM64,
    OP_MEMFADDR,
    OP_ONE,
    OP_REG,
    OP_SI,
    OP_SS,
    OP_XLAT,
    BitOp,
    ByteOp,
    IncSP,
    Mmx,
    ModRM,
    NoMod,
    Sse,
)
from emufuzz.emulator.opcode import OperandDecoder
from emufuzz.emulator.x86emul import (
    MASK16,
    MASK64,
    MAX_INSN_LENGTH,
    OPERAND_IMM,
    OPERAND_MEM,
    OPERAND_MM,
    OPERAND_NONE,
    OPERAND_REG,
    OPERAND_XMM,
    SIZE_MASK,
    X86EMUL_CONTINUE,
    X86EMUL_F_FETCH,
    X86EMUL_MODE_PROT64,
)

SREG_ES: Final = 0
SREG_CS: Final = 1
SREG_SS: Final = 2
RAX: Final = 0
RCX: Final = 1
RDX: Final = 2
RBX: Final = 3
RSP: Final = 4
RBP: Final = 5
RSI: Final = 6
RDI: Final = 7

_UNSIGNED: Final = {1: Struct("<B"), 2: Struct("<H"), 4: Struct("<I"), 8: Struct("<Q")}
_SIGNED: Final = {1: Struct("<b"), 2: Struct("<h"), 4: Struct("<i"), 8: Struct("<q")}


def do_insn_fetch_bytes(ctxt: X86EmulateCtxt, op_size: int) -> int:
    """Extend the fetch window as far as the page, the segment and 15 bytes allow.

    At least `op_size` more bytes are needed. #GP(0) when they are beyond the 15-byte limit or
    the end of CS (KVM: __do_insn_fetch_bytes).
    """
    have = len(ctxt.fetch_data)
    la = linearize(ctxt, SREG_CS, ctxt.eip + have, 0, X86EMUL_F_FETCH)
    if la < 0:
        return -la
    size = min(MAX_INSN_LENGTH ^ have, ctxt.max_size, 4096 - (la & 4095))
    if size < op_size:
        return emulate_gp(ctxt, 0)
    rc, data = ctxt.ops.fetch(ctxt, la, size, ctxt.exception)
    if rc == X86EMUL_CONTINUE:
        ctxt.fetch_data += data
    return rc


def insn_fetch(ctxt: X86EmulateCtxt, size: int) -> int:
    """The next `size` (1, 2, 4, 8) instruction bytes, unsigned; 0 with ctxt.rc set on failure."""
    pos = ctxt.fetch_pos
    missing = pos + size - len(ctxt.fetch_data)
    if missing > 0:
        ctxt.rc = do_insn_fetch_bytes(ctxt, missing)
        if ctxt.rc != X86EMUL_CONTINUE:
            return 0
    ctxt.fetch_pos = pos + size
    if size == 1:
        return ctxt.fetch_data[pos]
    value: int = _UNSIGNED[size].unpack_from(ctxt.fetch_data, pos)[0]
    return value


def insn_fetch_signed(ctxt: X86EmulateCtxt, size: int) -> int:
    """The next `size` instruction bytes as a signed int; 0 with ctxt.rc set on failure."""
    pos = ctxt.fetch_pos
    missing = pos + size - len(ctxt.fetch_data)
    if missing > 0:
        ctxt.rc = do_insn_fetch_bytes(ctxt, missing)
        if ctxt.rc != X86EMUL_CONTINUE:
            return 0
    ctxt.fetch_pos = pos + size
    value: int = _SIGNED[size].unpack_from(ctxt.fetch_data, pos)[0]
    return value


def set_register(ctxt: X86EmulateCtxt, op: Operand, reg: int, size: int) -> None:
    """Make `op` the GPR `reg` at `size` (1, 2, 4, 8) bytes and fetch it.

    The register is marked as written at once, as in KVM, whatever becomes of the operand.
    """
    op.type = OPERAND_REG
    op.bytes = size
    op.reg = reg
    op.shift = 0
    op.val = op.orig_val = reg_rmw(ctxt, reg) & SIZE_MASK[size]


def set_byte_register(ctxt: X86EmulateCtxt, op: Operand, reg: int) -> None:
    """Make `op` an 8-bit register: without any REX prefix, 4..7 are AH, CH, DH, BH."""
    op.type = OPERAND_REG
    op.bytes = 1
    if 4 <= reg < 8 and not ctxt.rex_prefix:
        op.reg = reg & 3
        op.shift = 8
        op.val = op.orig_val = reg_rmw(ctxt, reg & 3) >> 8 & 0xFF
    else:
        op.reg = reg
        op.shift = 0
        op.val = op.orig_val = reg_rmw(ctxt, reg) & 0xFF


def _set_vector_register(ctxt: X86EmulateCtxt, op: Operand, reg: int) -> None:
    """Make `op` an XMM register (fetched now) or an MMX register (fetched before execution)."""
    if ctxt.d & Sse:
        op.type = OPERAND_XMM
        op.bytes = 16
        op.reg = reg
        ctxt.fpu.get()
        op.val = op.orig_val = ctxt.fpu.xmm[reg]
    else:
        op.type = OPERAND_MM
        op.bytes = 8
        op.reg = reg & 7


def decode_modrm(ctxt: X86EmulateCtxt) -> int:
    """Split ModRM and form the memory operand (or register operand) it names, in ctxt.memop."""
    modrm = ctxt.modrm
    rex = ctxt.rex_prefix
    ctxt.modrm_reg = modrm >> 3 & 7 | (rex & 4) << 1
    ctxt.modrm_mod = mod = modrm >> 6
    ctxt.modrm_rm = rm = modrm & 7 | (rex & 1) << 3
    ctxt.modrm_seg = 3  # VCPU_SREG_DS
    op = ctxt.memop
    d = ctxt.d
    if mod == 3 or d & NoMod:
        if d & (Sse | Mmx):
            _set_vector_register(ctxt, op, rm)
        elif d & ByteOp:
            set_byte_register(ctxt, op, rm)
        else:
            set_register(ctxt, op, rm, ctxt.op_bytes)
        return X86EMUL_CONTINUE
    op.type = OPERAND_MEM
    op.val = 0
    ctxt.rc = X86EMUL_CONTINUE
    if ctxt.ad_bytes == 2:
        op.ea = _modrm16(ctxt, mod, rm & 7)
    else:
        op.ea = _modrm32(ctxt, mod, rm) & ADDRESS_MASK[ctxt.ad_bytes]
    return ctxt.rc


#: ModRM.rm -> the registers that a 16-bit address adds up (SDM Vol. 2A Table 2-1).
_MODRM16_REGS: Final = ((RBX, RSI), (RBX, RDI), (RBP, RSI), (RBP, RDI), (RSI,), (RDI,), (RBP,), (RBX,))


def _modrm16(ctxt: X86EmulateCtxt, mod: int, rm: int) -> int:
    if mod == 0 and rm == 6:
        return insn_fetch(ctxt, 2)
    ea = 0
    if mod == 1:
        ea = insn_fetch_signed(ctxt, 1)
    elif mod == 2:
        ea = insn_fetch(ctxt, 2)
    for reg in _MODRM16_REGS[rm]:
        ea += reg_read(ctxt, reg)
        if reg == RBP:
            ctxt.modrm_seg = SREG_SS
    return ea & MASK16


def _modrm32(ctxt: X86EmulateCtxt, mod: int, rm: int) -> int:
    """32- and 64-bit forms. The default segment is SS for a base of exactly RSP or RBP."""
    if rm & 7 == 4:
        ea = _sib(ctxt, mod)
        if ctxt.rc != X86EMUL_CONTINUE:
            return 0
    elif rm & 7 == 5 and mod == 0:
        if ctxt.mode == X86EMUL_MODE_PROT64:
            ctxt.rip_relative = True
        return insn_fetch_signed(ctxt, 4)
    else:
        ea = reg_read(ctxt, rm)
        if rm == RBP:
            ctxt.modrm_seg = SREG_SS
    if mod == 1:
        ea += insn_fetch_signed(ctxt, 1)
    elif mod == 2:
        ea += insn_fetch_signed(ctxt, 4)
    return ea


def _sib(ctxt: X86EmulateCtxt, mod: int) -> int:
    sib = insn_fetch(ctxt, 1)
    if ctxt.rc != X86EMUL_CONTINUE:
        return 0
    rex = ctxt.rex_prefix
    index = sib >> 3 & 7 | (rex & 2) << 2
    base = sib & 7 | (rex & 1) << 3
    if base & 7 == 5 and mod == 0:
        ea = insn_fetch_signed(ctxt, 4)
    else:
        ea = reg_read(ctxt, base)
        if base in (RSP, RBP):
            ctxt.modrm_seg = SREG_SS
            if base == RSP and ctxt.d & IncSP:
                ea += ctxt.op_bytes  # POP addresses memory by the RSP after the pop
    if index != RSP:
        ea += reg_read(ctxt, index) << (sib >> 6)
    return ea


def decode_abs(ctxt: X86EmulateCtxt) -> int:
    """A bare offset of address size (moffs)."""
    ctxt.rc = X86EMUL_CONTINUE
    ctxt.memop.type = OPERAND_MEM
    ctxt.memop.val = 0
    ctxt.memop.ea = insn_fetch(ctxt, ctxt.ad_bytes)
    return ctxt.rc


def _operand_size(ctxt: X86EmulateCtxt) -> int:
    return 1 if ctxt.d & ByteOp else ctxt.op_bytes


def _reg(ctxt: X86EmulateCtxt, op: Operand) -> int:
    d = ctxt.d
    reg = ctxt.modrm_reg if d & ModRM else ctxt.b & 7 | (ctxt.rex_prefix & 1) << 3
    if d & (Sse | Mmx):
        _set_vector_register(ctxt, op, reg)
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
    OP_REG: _reg,
    OP_MEM: _mem,
    OP_ACC: _acc,
    OP_DI: _di,
    OP_MEM64: _mem64,
    OP_IMMUBYTE: _imm_u_byte,
    OP_DX: _dx,
    OP_CL: _cl,
    OP_IMMBYTE: _imm_byte,
    OP_ONE: _one,
    OP_IMM: _imm,
    OP_MEM16: _mem_sized(2),
    OP_MEM32: _mem_sized(4),
    OP_SI: _si,
    OP_IMMFADDR: _imm_faddr,
    OP_MEMFADDR: _mem_faddr,
    OP_IMMU16: _imm_u16,
    OP_ES: _segment_register(0),
    OP_CS: _segment_register(1),
    OP_SS: _segment_register(2),
    OP_DS: _segment_register(3),
    OP_FS: _segment_register(4),
    OP_GS: _segment_register(5),
    OP_MEM8: _mem8,
    OP_IMM64: _imm64,
    OP_XLAT: _xlat,
    OP_ACCLO: _acc_lo,
    OP_ACCHI: _acc_hi,
}
