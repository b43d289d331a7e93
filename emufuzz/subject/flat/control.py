"""Which values the flat machine's control, debug and performance registers take."""

from __future__ import annotations

from typing import Any, Final

from emufuzz.arch import cr as crs
from emufuzz.case.model import System

_CS: Final = 1
_MASK32: Final = 0xFFFFFFFF
_CR0_KEPT: Final = 0xE005003F
_CR4_KNOWN: Final = 0x771FFF
_DR6_VOLATILE: Final = 0x1E80F
_DR6_FIXED: Final = 0xFFFE07F0 | 0x10000 | 0x800
_DR7_VOLATILE: Final = 0xFFFF2BFF
_DR7_FIXED: Final = 0x400

#: A performance counter reads this plus its index.
PMC_VALUE: Final = 0x123400000000


def write_cr(system: System, cr: int, val: int) -> dict[str, Any] | None:
    """The members of the state that MOV to CR changes; None if the value is refused."""
    if cr == 0:
        return _write_cr0(system, system.cr0 & ~_MASK32 | val & _MASK32)
    if cr == 2:
        return {"cr2": val}
    if cr == 3:
        return _write_cr3(system, val)
    if cr == 4:
        return _write_cr4(system, system.cr4 & ~_MASK32 | val & _MASK32)
    return {"cr8": val} if val <= 15 else None


def _write_cr0(system: System, val: int) -> dict[str, Any] | None:
    paging, was_paging = val & crs.X86_CR0_PG, system.cr0 & crs.X86_CR0_PG
    long_cs = system.seg[_CS].l
    if val >> 32 or (val & crs.X86_CR0_NW and not val & crs.X86_CR0_CD):
        return None
    if paging and not val & crs.X86_CR0_PE:
        return None
    if paging and not was_paging and system.efer & crs.EFER_LME:
        if not system.cr4 & crs.X86_CR4_PAE or long_cs:
            return None
    if was_paging and not paging:
        if (system.efer & crs.EFER_LMA and long_cs) or system.cr4 & crs.X86_CR4_PCIDE:
            return None
    efer = system.efer
    if efer & crs.EFER_LME:
        efer = efer | crs.EFER_LMA if paging else efer & ~crs.EFER_LMA
    return {"cr0": val & _CR0_KEPT | crs.X86_CR0_ET, "efer": efer}


def _write_cr3(system: System, val: int) -> dict[str, Any] | None:
    if system.cr4 & crs.X86_CR4_PCIDE:
        val &= ~(1 << 63)
    if system.efer & crs.EFER_LMA and val >> 52:
        return None
    return {"cr3": val}


def _write_cr4(system: System, val: int) -> dict[str, Any] | None:
    lma = system.efer & crs.EFER_LMA
    if val & ~_CR4_KNOWN:
        return None
    if lma and (not val & crs.X86_CR4_PAE or (val ^ system.cr4) & crs.X86_CR4_LA57):
        return None
    if val & ~system.cr4 & crs.X86_CR4_PCIDE and (not lma or system.cr3 & 0xFFF):
        return None
    return {"cr4": val}


def write_dr(drs: tuple[int, ...], dr: int, val: int) -> tuple[int, ...] | None:
    """The debug registers after MOV to DR `dr` (0..7); None if DR6 or DR7 gets high bits."""
    index = dr
    if dr in (4, 5):
        index = dr + 2
    if index >= 6:
        if val >> 32:
            return None
        if index == 6:
            val = val & _DR6_VOLATILE | _DR6_FIXED
        else:
            val = val & _DR7_VOLATILE | _DR7_FIXED
    return (*drs[:index], val, *drs[index + 1 :])


def pmc_exists(pmc: int) -> bool:
    """Four programmable performance counters, and three fixed ones selected by bit 30."""
    if pmc & 1 << 31:
        return False
    index = pmc & ~(1 << 30)
    return index < 3 if pmc & 1 << 30 else index < 4


def is_canonical(addr: int, cr4: int) -> bool:
    """SDM Vol. 1 3.3.7.1, 48 bits or 57 with CR4.LA57."""
    bits = 57 if cr4 & crs.X86_CR4_LA57 else 48
    upper = addr >> (bits - 1)
    return upper in (0, (1 << (65 - bits)) - 1)
