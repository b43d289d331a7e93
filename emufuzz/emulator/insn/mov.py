"""Moves and exchanges (SDM Vol. 2A/2B: MOV, MOVZX, MOVSX, LEA, XCHG, CMPXCHG ...).

emulate.c: em_mov, em_xchg, em_cmpxchg, em_cmpxchg8b and rows of the opcode switch.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.arch.rflags import X86_EFLAGS_ZF
from emufuzz.emulator.ctxt import Operand, X86EmulateCtxt, assign_register, reg_read, reg_rmw, reg_write
from emufuzz.emulator.eflags import cmp
from emufuzz.emulator.x86emul import (
    MASK32,
    MASK64,
    OPERAND_NONE,
    OPERAND_REG,
    X86EMUL_CONTINUE,
    X86EMUL_UNHANDLEABLE,
)

_SIGN: Final = {1: 0x80, 2: 0x8000, 4: 0x80000000}


def sign_extend(value: int, size: int) -> int:
    """The low `size` (1, 2, 4) bytes of a value, sign-extended to 64 bits."""
    sign = _SIGN[size]
    return ((value & (sign << 1) - 1) ^ sign) - sign & MASK64


def em_mov(ctxt: X86EmulateCtxt) -> int:
    """MOV and everything that only moves: MOVS, STOS, LODS, MOVNTI, MMX and SSE moves."""
    ctxt.dst.val = ctxt.src.val
    return X86EMUL_CONTINUE


def em_movsxd(ctxt: X86EmulateCtxt) -> int:
    """MOVSXD r, r/m32 (SDM Vol. 2B MOVSX/MOVSXD).

    KVM deviation: with a 16-bit operand size it still reads 4 bytes.
    """
    ctxt.dst.val = sign_extend(ctxt.src.val, 4)
    return X86EMUL_CONTINUE


def sw_movzx(ctxt: X86EmulateCtxt) -> int:
    """MOVZX r, r/m8 or r/m16."""
    ctxt.dst.bytes = ctxt.op_bytes
    ctxt.dst.val = ctxt.src.val & (0xFF if ctxt.src.bytes == 1 else 0xFFFF)
    return X86EMUL_CONTINUE


def sw_movsx(ctxt: X86EmulateCtxt) -> int:
    """MOVSX r, r/m8 or r/m16."""
    ctxt.dst.bytes = ctxt.op_bytes
    ctxt.dst.val = sign_extend(ctxt.src.val, 1 if ctxt.src.bytes == 1 else 2)
    return X86EMUL_CONTINUE


def sw_lea(ctxt: X86EmulateCtxt) -> int:
    """LEA r, m: the effective address itself."""
    ctxt.dst.val = ctxt.src.ea
    return X86EMUL_CONTINUE


def sw_nop(ctxt: X86EmulateCtxt) -> int:  # noqa: ARG001 - the shape of a handler
    """NOP r/m and the prefetch hints: nothing, not even an access."""
    return X86EMUL_CONTINUE


def em_xchg(ctxt: X86EmulateCtxt) -> int:
    """XCHG r/m, r. A memory destination is locked whether or not there is a LOCK prefix."""
    src, dst = ctxt.src, ctxt.dst
    _write_source(ctxt, src, dst.val)
    dst.val = src.orig_val
    ctxt.lock_prefix = True
    return X86EMUL_CONTINUE


def _write_source(ctxt: X86EmulateCtxt, src: Operand, value: int) -> None:
    src.val = value
    if src.shift:
        merged = reg_read(ctxt, src.reg) & ~0xFF00 | (value & 0xFF) << 8
        assign_register(ctxt, src.reg, merged, 8)
    else:
        assign_register(ctxt, src.reg, value, src.bytes)


def sw_xchg_rax(ctxt: X86EmulateCtxt) -> int:
    """90+r: XCHG r, rAX; with rAX itself it is NOP (or PAUSE) and writes nothing."""
    if ctxt.dst.reg == VCPU_REGS_RAX:
        ctxt.dst.type = OPERAND_NONE
        return X86EMUL_CONTINUE
    return em_xchg(ctxt)


def em_cmpxchg(ctxt: X86EmulateCtxt) -> int:
    """CMPXCHG r/m, r: flags as CMP rAX, r/m. A failed comparison writes the old value back."""
    src, dst = ctxt.src, ctxt.dst
    old, new = dst.val, src.val
    dst.orig_val = old
    src.orig_val = new
    _, ctxt.eflags = cmp(dst.bytes, reg_read(ctxt, VCPU_REGS_RAX), old, ctxt.eflags)
    if ctxt.eflags & X86_EFLAGS_ZF:
        src.type = OPERAND_NONE
        dst.val = new
    else:
        # KVM deviation: a 32-bit failure with a register destination zero-extends both
        # registers (SDM Vol. 2A CMPXCHG leaves the destination as it is).
        src.type = OPERAND_REG
        reg_rmw(ctxt, VCPU_REGS_RAX)
        src.reg = VCPU_REGS_RAX
        src.shift = 0
        src.val = old
        dst.val = old
    return X86EMUL_CONTINUE


def em_cmpxchg8b(ctxt: X86EmulateCtxt) -> int:
    """CMPXCHG8B m64.

    KVM deviation: CMPXCHG16B is unhandleable, after its operand was read; CPUID is not looked at
    (SDM Vol. 2A CMPXCHG8B).
    """
    dst = ctxt.dst
    if dst.bytes == 16:
        ctxt.fail_reason = "CMPXCHG16B"
        return X86EMUL_UNHANDLEABLE
    old = dst.val
    expected = reg_read(ctxt, VCPU_REGS_RAX) & MASK32 | (reg_read(ctxt, VCPU_REGS_RDX) & MASK32) << 32
    if old == expected:
        low = reg_read(ctxt, VCPU_REGS_RBX) & MASK32
        dst.val = (reg_read(ctxt, VCPU_REGS_RCX) & MASK32) << 32 | low
        ctxt.eflags |= X86_EFLAGS_ZF
    else:
        reg_write(ctxt, VCPU_REGS_RAX, old & MASK32)
        reg_write(ctxt, VCPU_REGS_RDX, old >> 32)
        ctxt.eflags &= ~X86_EFLAGS_ZF
    return X86EMUL_CONTINUE
