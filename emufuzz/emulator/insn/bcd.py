"""Decimal adjustment: DAS, AAM, AAD (emulate.c: em_das, em_aam, em_aad; SDM Vol. 2A, 2B).

SF, ZF and PF come from an OR of the destination with 0, which also clears OF and, undefined, AF and CF.
"""

from __future__ import annotations

from emufuzz.arch.rflags import X86_EFLAGS_AF, X86_EFLAGS_CF
from emufuzz.emulator import eflags
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.faults import emulate_de
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE

_or = eflags.or_


def em_das(ctxt: X86EmulateCtxt) -> int:
    """DAS: adjust AL after subtraction; OF, undefined, is 0 (SDM Vol. 2A DAS)."""
    dst = ctxt.dst
    old_al = al = dst.val & 0xFF
    old_cf = ctxt.eflags & X86_EFLAGS_CF
    carries = 0
    if al & 0x0F > 9 or ctxt.eflags & X86_EFLAGS_AF:
        carries = X86_EFLAGS_AF | old_cf | (X86_EFLAGS_CF if al < 6 else 0)
        al = al - 6 & 0xFF
    if old_al > 0x99 or old_cf:
        carries |= X86_EFLAGS_CF
        al -= 0x60
    dst.val, flags = _or(1, al, 0, ctxt.eflags)
    ctxt.eflags = flags | carries
    return X86EMUL_CONTINUE


def em_aam(ctxt: X86EmulateCtxt) -> int:
    """AAM: AH = AL / src, AL = AL % src; #DE for src 0 (SDM Vol. 2A AAM).

    KVM deviation: SF and ZF describe the whole operand (AX or EAX), not AL.
    """
    base = ctxt.src.val
    if not base:
        return emulate_de(ctxt)
    dst = ctxt.dst
    high, low = divmod(dst.val & 0xFF, base)
    dst.val, ctxt.eflags = _or(dst.bytes, dst.val & 0xFFFF0000 | high << 8 | low, 0, ctxt.eflags)
    return X86EMUL_CONTINUE


def em_aad(ctxt: X86EmulateCtxt) -> int:
    """AAD: AL = AL + AH * src, AH = 0 (SDM Vol. 2A AAD).

    KVM deviation: SF and ZF describe the whole operand (AX or EAX), not AL.
    """
    dst = ctxt.dst
    low = (dst.val & 0xFF) + (dst.val >> 8 & 0xFF) * ctxt.src.val & 0xFF
    dst.val, ctxt.eflags = _or(dst.bytes, dst.val & 0xFFFF0000 | low, 0, ctxt.eflags)
    return X86EMUL_CONTINUE
