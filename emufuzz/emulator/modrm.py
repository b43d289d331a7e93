"""ModRM, SIB and displacement: the register or memory operand that an instruction names.

emulate.c: decode_register, decode_modrm, decode_abs. SDM Vol. 2A 2.1.5 (tables 2-1 to 2-3), 2.2.1.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.access import ADDRESS_MASK
from emufuzz.emulator.ctxt import Operand, X86EmulateCtxt, reg_read, reg_rmw
from emufuzz.emulator.fetch import insn_fetch, insn_fetch_signed
from emufuzz.emulator.flags import ByteOp, IncSP, Mmx, NoMod, Sse
from emufuzz.emulator.x86emul import (
    MASK16,
    OPERAND_MEM,
    OPERAND_MM,
    OPERAND_REG,
    OPERAND_XMM,
    SIZE_MASK,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT64,
)

SREG_SS: Final = 2
RBX: Final = 3
RSP: Final = 4
RBP: Final = 5
RSI: Final = 6
RDI: Final = 7


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


def set_vector_register(ctxt: X86EmulateCtxt, op: Operand, reg: int) -> None:
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
            set_vector_register(ctxt, op, rm)
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
