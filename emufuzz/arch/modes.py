"""The seven processor modes of a case, and how a machine state decides its mode (SDM Vol. 3A 2.2)."""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_LMA, X86_CR0_PE
from emufuzz.arch.rflags import X86_EFLAGS_VM

MODES: Final = ("real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64")


def mode_of(cr0: int, efer: int, rflags: int, cs_l: int, cs_db: int) -> str:
    """The mode that CR0.PE, EFER.LMA, RFLAGS.VM and CS.L/CS.D select.

    With EFER.LMA set RFLAGS.VM is ignored, as there is no virtual-8086 mode in IA-32e mode.
    """
    if not cr0 & X86_CR0_PE:
        return "real"
    if efer & EFER_LMA:
        if cs_l:
            return "prot64"
        return "compat32" if cs_db else "compat16"
    if rflags & X86_EFLAGS_VM:
        return "vm86"
    return "prot32" if cs_db else "prot16"
