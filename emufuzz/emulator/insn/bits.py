"""Bit tests and scans, byte swaps, SETcc and CMOVcc.

emulate.c: FASTOP2W(bt ... btc), em_bsf_c, em_bsr_c, em_bswap, em_movbe, opcode switch. SDM Vol. 2.
"""

from __future__ import annotations

from emufuzz.emulator import eflags
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.eflags_tables import CONDITION
from emufuzz.emulator.faults import emulate_ud
from emufuzz.emulator.x86emul import OPERAND_NONE, X86EMUL_CONTINUE

_bt, _bts, _btr, _btc = eflags.bt, eflags.bts, eflags.btr, eflags.btc
_bsf, _bsr = eflags.bsf, eflags.bsr


def em_bt(ctxt: X86EmulateCtxt) -> int:
    """BT: CF = bit src of dst (SDM Vol. 2A BT)."""
    dst = ctxt.dst
    ctxt.eflags = _bt(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)[1]
    return X86EMUL_CONTINUE


def em_bts(ctxt: X86EmulateCtxt) -> int:
    """BTS: BT, then the bit is set (SDM Vol. 2A BTS)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _bts(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_btr(ctxt: X86EmulateCtxt) -> int:
    """BTR: BT, then the bit is cleared (SDM Vol. 2A BTR)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _btr(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_btc(ctxt: X86EmulateCtxt) -> int:
    """BTC: BT, then the bit is inverted (SDM Vol. 2A BTC)."""
    dst = ctxt.dst
    dst.val, ctxt.eflags = _btc(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_bsf_c(ctxt: X86EmulateCtxt) -> int:
    """BSF: dst = index of the lowest 1 bit of src (SDM Vol. 2A BSF).

    KVM deviation: a zero source leaves the whole destination register, with 32-bit operands too;
    F3 0F BC (TZCNT) is BSF, whatever CPUID says.
    """
    dst = ctxt.dst
    if not ctxt.src.val:
        dst.type = OPERAND_NONE
    dst.val, ctxt.eflags = _bsf(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_bsr_c(ctxt: X86EmulateCtxt) -> int:
    """BSR: dst = index of the highest 1 bit of src (SDM Vol. 2A BSR); LZCNT and zero as em_bsf_c."""
    dst = ctxt.dst
    if not ctxt.src.val:
        dst.type = OPERAND_NONE
    dst.val, ctxt.eflags = _bsr(dst.bytes, dst.val, ctxt.src.val, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_bswap(ctxt: X86EmulateCtxt) -> int:
    """BSWAP: dst's bytes in reverse order (SDM Vol. 2A BSWAP).

    KVM deviation: the 16-bit form, which is undefined, swaps the zero-extended value as 32 bits
    and so stores 0 (SDM Vol. 2A BSWAP).
    """
    dst = ctxt.dst
    size = 8 if ctxt.op_bytes == 8 else 4
    dst.val = int.from_bytes(dst.val.to_bytes(size, "little"), "big")
    return X86EMUL_CONTINUE


def em_movbe(ctxt: X86EmulateCtxt) -> int:
    """MOVBE: dst = src's bytes in reverse order; #UD without CPUID.01H:ECX.MOVBE (SDM Vol. 2B MOVBE)."""
    if not ctxt.ops.guest_has_movbe(ctxt):
        return emulate_ud(ctxt)
    ctxt.dst.val = int.from_bytes(ctxt.src.val.to_bytes(ctxt.op_bytes, "little"), "big")
    return X86EMUL_CONTINUE


def sw_setcc(ctxt: X86EmulateCtxt) -> int:
    """SETcc: dst = the condition, 1 or 0 (SDM Vol. 2B SETcc)."""
    ctxt.dst.val = 1 if CONDITION[ctxt.b & 0xF][ctxt.eflags & 0xFFF] else 0
    return X86EMUL_CONTINUE


def sw_cmov(ctxt: X86EmulateCtxt) -> int:
    """CMOVcc: dst = src if the condition holds (SDM Vol. 2A CMOVcc).

    A 32-bit destination is written in any case, which clears bits 63:32.
    """
    if CONDITION[ctxt.b & 0xF][ctxt.eflags & 0xFFF]:
        ctxt.dst.val = ctxt.src.val
    elif ctxt.op_bytes != 4:
        ctxt.dst.type = OPERAND_NONE
    return X86EMUL_CONTINUE
