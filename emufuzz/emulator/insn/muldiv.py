"""Multiplication and division (emulate.c: FASTOP1SRC2(mul, imul), FASTOP1SRC2EX(div, idiv), em_imul_3op).

One-operand forms: dst is rAX, src is rDX, src2 the operand, both written back. The byte forms have
AX as dst and no src, so that AX takes both halves. SDM Vol. 2A MUL, IMUL, DIV, IDIV.
"""

from __future__ import annotations

from emufuzz.emulator import eflags
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.faults import emulate_de
from emufuzz.emulator.flags import ByteOp
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE

_mul, _imul, _imul2, _div, _idiv = (
    eflags.mul, eflags.imul, eflags.imul2, eflags.div, eflags.idiv,
)  # fmt: skip


def em_mul_ex(ctxt: X86EmulateCtxt) -> int:
    """MUL: rDX:rAX (byte form AX) = rAX * src2, unsigned."""
    dst = ctxt.dst
    if ctxt.d & ByteOp:
        low, high, ctxt.eflags = _mul(1, dst.val, ctxt.src2.val, ctxt.eflags)
        dst.val = high << 8 | low
    else:
        dst.val, ctxt.src.val, ctxt.eflags = _mul(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_imul_ex(ctxt: X86EmulateCtxt) -> int:
    """IMUL, one operand: rDX:rAX (byte form AX) = rAX * src2, signed."""
    dst = ctxt.dst
    if ctxt.d & ByteOp:
        low, high, ctxt.eflags = _imul(1, dst.val, ctxt.src2.val, ctxt.eflags)
        dst.val = high << 8 | low
    else:
        dst.val, ctxt.src.val, ctxt.eflags = _imul(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_div_ex(ctxt: X86EmulateCtxt) -> int:
    """DIV: rAX = rDX:rAX / src2, rDX = rest (byte form AL and AH, of AX), unsigned; #DE."""
    dst = ctxt.dst
    if ctxt.d & ByteOp:
        answer = _div(1, dst.val, dst.val >> 8, ctxt.src2.val, ctxt.eflags)
        if answer is None:
            return emulate_de(ctxt)
        dst.val = answer[1] << 8 | answer[0]
        ctxt.eflags = answer[2]
        return X86EMUL_CONTINUE
    answer = _div(dst.bytes, dst.val, ctxt.src.val, ctxt.src2.val, ctxt.eflags)
    if answer is None:
        return emulate_de(ctxt)
    dst.val, ctxt.src.val, ctxt.eflags = answer
    return X86EMUL_CONTINUE


def em_idiv_ex(ctxt: X86EmulateCtxt) -> int:
    """IDIV: as DIV, signed, truncating towards 0; #DE."""
    dst = ctxt.dst
    if ctxt.d & ByteOp:
        answer = _idiv(1, dst.val, dst.val >> 8, ctxt.src2.val, ctxt.eflags)
        if answer is None:
            return emulate_de(ctxt)
        dst.val = answer[1] << 8 | answer[0]
        ctxt.eflags = answer[2]
        return X86EMUL_CONTINUE
    answer = _idiv(dst.bytes, dst.val, ctxt.src.val, ctxt.src2.val, ctxt.eflags)
    if answer is None:
        return emulate_de(ctxt)
    dst.val, ctxt.src.val, ctxt.eflags = answer
    return X86EMUL_CONTINUE


def em_imul(ctxt: X86EmulateCtxt) -> int:
    """IMUL, two operands: dst *= src."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _imul2(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_imul_3op(ctxt: X86EmulateCtxt) -> int:
    """IMUL, three operands: dst = src * src2 (the immediate)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _imul2(dst.bytes, ctxt.src2.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE
