"""The ordinary machine state that a case is measured against: one per mode, privilege level and exit path.

A field of a case has its default if it is as here. Registers are 0 and RFLAGS has its fixed bit alone,
and VM in virtual-8086 mode. Segments, tables and control registers are those of
`emufuzz.case.build.build_system`: flat, with the code at 0x6000. Outside IA-32e mode, which cannot do
without, paging is off. There are no MSRs, no memory but the pages of the code, no devices, and KVM's
knobs are as the exit path implies them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from emufuzz.arch import cr, rflags
from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.case.build import CODE_BASE, LONG_MODES, build_system, cpls_of
from emufuzz.case.model import Case

#: Exit paths that exist with a bit of CR4 only (docs/case-format.md, Paths).
_PATH_CR4: Final = {"desc": cr.X86_CR4_UMIP}


def cpl_of(case: Case) -> int:
    """The privilege level: DPL of SS; 0 in real and 3 in virtual-8086 mode (SDM Vol. 3C 26.4.1)."""
    levels = cpls_of(case.mode)
    return case.system.seg[VCPU_SREG_SS].dpl if len(levels) > 1 else levels[0]


def default_case(case: Case, cpl: int | None = None) -> Case:
    """The case's code, mode and exit path, at privilege level `cpl` or its own, and all else default."""
    level = cpl_of(case) if cpl is None else cpl
    plain = _default(case.mode, level, case.path)
    return Case(
        case.id, case.mode, case.code, plain.gpr, plain.rip, plain.rflags, plain.system, path=case.path
    )


@lru_cache(maxsize=512)
def _default(mode: str, cpl: int, path: str | None) -> Case:
    system = build_system(mode, cpl)
    changes = {"cr4": system.cr4 | _PATH_CR4.get(path or "", 0)}
    if mode not in LONG_MODES:
        changes |= {"cr0": system.cr0 & ~(cr.X86_CR0_PG | cr.X86_CR0_WP), "cr3": 0}
    vm = rflags.X86_EFLAGS_VM if mode == "vm86" else 0
    return Case(
        "",
        mode,
        b"",
        (0,) * 16,
        CODE_BASE,
        rflags.X86_EFLAGS_FIXED | vm,
        build_system(mode, cpl, **changes),
        path=path,
    )
