"""Shifts and rotates: the destination is dst, the count is src2 (emulate.c: FASTOP2CL, FASTOP3WCL).

SDM Vol. 2B RCL/RCR/ROL/ROR, SAL/SAR/SHL/SHR, SHLD, SHRD. `emufuzz.emulator.eflags_shift` computes.
"""

from __future__ import annotations

from emufuzz.emulator import eflags
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE

_rol, _ror, _rcl, _rcr = eflags.rol, eflags.ror, eflags.rcl, eflags.rcr
_shl, _shr, _sar = eflags.shl, eflags.shr, eflags.sar
_shld, _shrd = eflags.shld, eflags.shrd


def em_rol(ctxt: X86EmulateCtxt) -> int:
    """ROL: rotate left."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _rol(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_ror(ctxt: X86EmulateCtxt) -> int:
    """ROR: rotate right."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _ror(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_rcl(ctxt: X86EmulateCtxt) -> int:
    """RCL: rotate left through CF."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _rcl(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_rcr(ctxt: X86EmulateCtxt) -> int:
    """RCR: rotate right through CF."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _rcr(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_shl(ctxt: X86EmulateCtxt) -> int:
    """SHL, SAL (also as /6): shift left."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _shl(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_shr(ctxt: X86EmulateCtxt) -> int:
    """SHR: shift right, zeros in."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _shr(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_sar(ctxt: X86EmulateCtxt) -> int:
    """SAR: shift right, sign in."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _sar(dst.bytes, dst.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_shld(ctxt: X86EmulateCtxt) -> int:
    """SHLD: shift left, src's bits in."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _shld(dst.bytes, dst.val, ctxt.src.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_shrd(ctxt: X86EmulateCtxt) -> int:
    """SHRD: shift right, src's bits in."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _shrd(dst.bytes, dst.val, ctxt.src.val, ctxt.src2.val, ctxt.eflags)
    return X86EMUL_CONTINUE
