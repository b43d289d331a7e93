"""The x87 instructions and state images that KVM knows (SDM Vol. 1 8.1, 10.5; Vol. 2: FNINIT, FXSAVE ...).

emulate.c: em_fninit, em_fnstcw, em_fnstsw, check_fxsr, em_fxsave, em_fxrstor.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

from emufuzz.arch.cr import X86_CR0_EM, X86_CR0_TS, X86_CR4_OSFXSR
from emufuzz.arch.fpu import MXCSR_MASK
from emufuzz.emulator.access import segmented_read_std, segmented_write_std
from emufuzz.emulator.ctxt import FpuRegisters, X86EmulateCtxt
from emufuzz.emulator.faults import emulate_gp, emulate_nm, emulate_ud
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE, X86EMUL_MODE_PROT64, X86EMUL_UNHANDLEABLE

#: FCW, FSW, FTW, FOP, FIP, FDP, MXCSR, MXCSR_MASK of an FXSAVE image.
_HEADER: Final = Struct("<HHBxHQQII")
_ST_SLOT: Final = Struct("<QH6x")
#: Where the XMM registers begin in an FXSAVE image.
_XMM_OFFSET: Final = 160
_EXPONENT_MMX: Final = 0xFFFF


def _check_x87(ctxt: X86EmulateCtxt) -> int:
    """#NM with CR0.TS or CR0.EM; else the registers are loaded on the CPU."""
    if ctxt.ops.get_cr(ctxt, 0) & (X86_CR0_TS | X86_CR0_EM):
        return emulate_nm(ctxt)
    ctxt.fpu.get()
    return X86EMUL_CONTINUE


def em_fninit(ctxt: X86EmulateCtxt) -> int:
    """FNINIT."""
    rc = _check_x87(ctxt)
    if rc == X86EMUL_CONTINUE:
        fpu = ctxt.fpu
        fpu.fcw, fpu.fsw, fpu.ftw = 0x37F, 0, 0
        fpu.dirty = True
    return rc


def em_fnstcw(ctxt: X86EmulateCtxt) -> int:
    """FNSTCW m16."""
    rc = _check_x87(ctxt)
    if rc == X86EMUL_CONTINUE:
        ctxt.dst.val = ctxt.fpu.fcw
    return rc


def em_fnstsw(ctxt: X86EmulateCtxt) -> int:
    """FNSTSW m16.

    KVM deviation: the form FNSTSW AX is unknown (SDM Vol. 2A FSTSW).
    """
    rc = _check_x87(ctxt)
    if rc == X86EMUL_CONTINUE:
        ctxt.dst.val = ctxt.fpu.fsw
    return rc


def _check_fxsr(ctxt: X86EmulateCtxt) -> int:
    """KVM deviation: FXSAVE and FXRSTOR are unhandleable in 64-bit mode (SDM Vol. 2A FXSAVE)."""
    if not ctxt.ops.guest_has_fxsr(ctxt):
        return emulate_ud(ctxt)
    if ctxt.ops.get_cr(ctxt, 0) & (X86_CR0_TS | X86_CR0_EM):
        return emulate_nm(ctxt)
    if ctxt.mode == X86EMUL_MODE_PROT64:
        ctxt.fail_reason = "FXSAVE or FXRSTOR in 64-bit mode"
        return X86EMUL_UNHANDLEABLE
    return X86EMUL_CONTINUE


def _fxstate_size(ctxt: X86EmulateCtxt) -> int:
    """Bytes of the image that are moved: XMM0-7 only with CR4.OSFXSR.

    KVM deviation: the reserved rest of the 512 bytes is neither read nor written
    (SDM Vol. 2A FXSAVE).
    """
    return _XMM_OFFSET + (128 if ctxt.ops.get_cr(ctxt, 4) & X86_CR4_OSFXSR else 0)


def _fxsave_image(fpu: FpuRegisters) -> bytes:
    """The first 288 bytes of an FXSAVE image, with x87 instruction and data pointers of zero."""
    header = _HEADER.pack(fpu.fcw, fpu.fsw, fpu.ftw, 0, 0, 0, fpu.mxcsr, MXCSR_MASK)
    stack = b"".join(_ST_SLOT.pack(mm, _EXPONENT_MMX) for mm in fpu.mm)
    return header + stack + b"".join(xmm.to_bytes(16, "little") for xmm in fpu.xmm[:8])


def em_fxsave(ctxt: X86EmulateCtxt) -> int:
    """FXSAVE m512."""
    rc = _check_fxsr(ctxt)
    if rc != X86EMUL_CONTINUE:
        return rc
    ctxt.fpu.get()
    image = _fxsave_image(ctxt.fpu)[: _fxstate_size(ctxt)]
    return segmented_write_std(ctxt, ctxt.memop.seg, ctxt.memop.ea, image)


def em_fxrstor(ctxt: X86EmulateCtxt) -> int:
    """FXRSTOR m512.

    KVM deviation: of MXCSR only bits 31:16 are checked (SDM Vol. 2A FXRSTOR: all reserved bits).
    """
    rc = _check_fxsr(ctxt)
    if rc != X86EMUL_CONTINUE:
        return rc
    rc, image = segmented_read_std(ctxt, ctxt.memop.seg, ctxt.memop.ea, _fxstate_size(ctxt))
    if rc != X86EMUL_CONTINUE:
        return rc
    ctxt.fpu.get()
    fcw, fsw, ftw, _, _, _, mxcsr, _ = _HEADER.unpack_from(image)
    if mxcsr >> 16:
        return emulate_gp(ctxt, 0)
    fpu = ctxt.fpu
    fpu.fcw, fpu.fsw, fpu.ftw, fpu.mxcsr = fcw, fsw, ftw, mxcsr
    for i in range(8):
        fpu.mm[i] = _ST_SLOT.unpack_from(image, 32 + 16 * i)[0]
    for i in range((len(image) - _XMM_OFFSET) // 16):
        start = _XMM_OFFSET + 16 * i
        fpu.xmm[i] = int.from_bytes(image[start : start + 16], "little")
    fpu.get()
    fpu.dirty = True
    return X86EMUL_CONTINUE
