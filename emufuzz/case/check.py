"""Is a machine state one that a processor can be in? The rules a VM entry applies to a guest.

SDM Vol. 3C 27.3.1 "Checks on the Guest State Area", for an unrestricted guest (real mode and
protected mode without paging are allowed), with RPL rules applied in protected mode as software
cannot get around them. Cases that break the rules are valid cases; builders never make one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emufuzz.arch import cr
from emufuzz.arch.linear import is_canonical
from emufuzz.arch.modes import mode_of
from emufuzz.arch.regs import SREG_NAMES, VCPU_SREG_CS, VCPU_SREG_LDTR, VCPU_SREG_SS, VCPU_SREG_TR
from emufuzz.arch.rflags import X86_EFLAGS_FIXED, X86_EFLAGS_VM
from emufuzz.case.model import Memory, Segment, System
from emufuzz.case.segments import TYPE_LDT, TYPE_TSS16_BUSY, TYPE_TSS_BUSY, descriptor_bytes

_RFLAGS_RESERVED: Final = ~0x3F7FD7 & 0xFFFFFFFFFFFFFFFF
_LONG_MODES: Final = ("compat16", "compat32", "prot64")


def check_system(system: System, rflags: int) -> list[str]:
    """The rules that a machine state violates, one line each, naming the field; empty if it is valid."""
    cs = system.seg[VCPU_SREG_CS]
    mode = mode_of(system.cr0, system.efer, rflags, cs.l, cs.db)
    problems = [*_control_problems(system, rflags)]
    if mode == "vm86":
        problems += _vm86_problems(system)
    else:
        problems += _code_problems(system, mode)
        problems += _stack_problems(system, mode)
        problems += _data_problems(system, mode)
    problems += _system_segment_problems(system, mode)
    return problems


def _control_problems(system: System, rflags: int) -> Iterator[str]:
    cr0, long_mode = system.cr0, bool(system.efer & cr.EFER_LMA)
    paging, enabled = bool(cr0 & cr.X86_CR0_PG), bool(system.efer & cr.EFER_LME)
    if paging and not cr0 & cr.X86_CR0_PE:
        yield "cr0: PG without PE"
    if cr0 & cr.X86_CR0_NW and not cr0 & cr.X86_CR0_CD:
        yield "cr0: NW without CD"
    if long_mode != (enabled and paging):
        yield "efer: LMA is not LME and CR0.PG"
    if long_mode and not system.cr4 & cr.X86_CR4_PAE:
        yield "cr4: LMA without PAE"
    if system.cr4 & cr.X86_CR4_PCIDE and not long_mode:
        yield "cr4: PCIDE outside IA-32e mode"
    if system.cr8 > 15:
        yield "cr8: above 15"
    if not rflags & X86_EFLAGS_FIXED:
        yield "rflags: bit 1 is clear"
    if rflags & _RFLAGS_RESERVED:
        yield "rflags: a reserved bit is set"
    if rflags & X86_EFLAGS_VM and (long_mode or not cr0 & cr.X86_CR0_PE):
        yield "rflags: VM outside legacy protected mode"
    for name in ("gdtr", "idtr"):
        if not is_canonical(getattr(system, name).base):
            yield f"{name}.base: not canonical"


def _vm86_problems(system: System) -> Iterator[str]:
    for name, seg in zip(SREG_NAMES[:6], system.seg, strict=False):
        if seg.base != seg.sel << 4:
            yield f"seg.{name}.base: not selector * 16"
        if seg != Segment(seg.sel, seg.base, 0xFFFF, 3, 1, 3, 1):
            yield f"seg.{name}: limit and access rights are not 0xffff and 0xf3, as vm86 has them"


def _common_problems(name: str, seg: Segment) -> Iterator[str]:
    """What holds for every usable segment."""
    if seg.g and seg.limit & 0xFFF != 0xFFF:
        yield f"seg.{name}.limit: does not end in 0xfff, though G is set"
    if not seg.g and seg.limit >> 20:
        yield f"seg.{name}.limit: above 1 MiB, though G is clear"
    if name in ("cs", "ss", "ds", "es") and seg.base >> 32:
        yield f"seg.{name}.base: above 4 GiB"
    if not is_canonical(seg.base):
        yield f"seg.{name}.base: not canonical"


def _code_problems(system: System, mode: str) -> Iterator[str]:
    cs, ss = system.seg[VCPU_SREG_CS], system.seg[VCPU_SREG_SS]
    if not (cs.p and cs.s):
        yield "seg.cs: not a present code segment"
        return
    yield from _common_problems("cs", cs)
    if cs.type == 3:  # real mode's CS, which is a data segment to the hardware
        if mode != "real":
            yield "seg.cs.type: a data segment"
    elif cs.type & 9 != 9:
        yield "seg.cs.type: not an accessed code segment"
    elif cs.type & 4 and cs.dpl > ss.dpl:
        yield "seg.cs.dpl: conforming, but above SS.DPL"
    elif not cs.type & 4 and cs.dpl != ss.dpl:
        yield "seg.cs.dpl: is not SS.DPL"
    if mode == "prot64" and cs.db:
        yield "seg.cs.db: set together with L in IA-32e mode"


def _stack_problems(system: System, mode: str) -> Iterator[str]:
    cs, ss = system.seg[VCPU_SREG_CS], system.seg[VCPU_SREG_SS]
    if mode == "real" and ss.dpl:
        yield "seg.ss.dpl: not 0 in real mode"
    if mode != "real" and ss.dpl != ss.sel & 3:
        yield "seg.ss.dpl: is not the selector's RPL"
    if mode != "real" and (ss.sel ^ cs.sel) & 3:
        yield "seg.ss.sel: RPL differs from that of CS"
    if not ss.p:
        if mode != "prot64":
            yield "seg.ss: unusable outside 64-bit mode"
        return
    yield from _common_problems("ss", ss)
    if not ss.s or ss.type not in {3, 7}:
        yield "seg.ss.type: not an accessed, writable data segment"


def _data_problems(system: System, mode: str) -> Iterator[str]:
    for i, name in enumerate(SREG_NAMES[:6]):
        seg = system.seg[i]
        if i in (VCPU_SREG_CS, VCPU_SREG_SS) or not seg.p:
            continue
        yield from _common_problems(name, seg)
        if not seg.s or not seg.type & 1:
            yield f"seg.{name}.type: not an accessed code or data segment"
        elif seg.type & 8 and not seg.type & 2:
            yield f"seg.{name}.type: code that cannot be read"
        elif mode != "real" and seg.type <= 11 and seg.dpl < seg.sel & 3:
            yield f"seg.{name}.dpl: below the selector's RPL"


def _system_segment_problems(system: System, mode: str) -> Iterator[str]:
    tr, ldtr = system.seg[VCPU_SREG_TR], system.seg[VCPU_SREG_LDTR]
    types = {TYPE_TSS_BUSY} if mode in _LONG_MODES else {TYPE_TSS_BUSY, TYPE_TSS16_BUSY}
    if not tr.p or tr.s or tr.type not in types:
        yield "seg.tr: not a present, busy TSS"
    if tr.sel & 4:
        yield "seg.tr.sel: refers to the LDT"
    yield from _common_problems("tr", tr)
    if not ldtr.p:
        return
    if ldtr.s or ldtr.type != TYPE_LDT:
        yield "seg.ldtr.type: not an LDT"
    if ldtr.sel & 4:
        yield "seg.ldtr.sel: refers to the LDT"
    yield from _common_problems("ldtr", ldtr)


def check_descriptors(system: System, rflags: int, memory: Memory) -> list[str]:
    """Segment registers whose hidden part is not what their selector's descriptor in the GDT says.

    Real and virtual-8086 mode load no descriptors but TR and LDTR; a null selector and one that
    refers to the LDT are passed over. In IA-32e mode the bases of FS and GS are free.
    """
    if not system.cr0 & cr.X86_CR0_PE:
        return []
    long_mode = bool(system.efer & cr.EFER_LMA)
    first = VCPU_SREG_TR if rflags & X86_EFLAGS_VM and not long_mode else 0
    problems = []
    for name, seg in list(zip(SREG_NAMES, system.seg, strict=True))[first:]:
        if not seg.p or not seg.sel & ~7 or seg.sel & 4 or (long_mode and name in ("fs", "gs")):
            continue
        wanted = descriptor_bytes(seg, wide=long_mode and not seg.s)
        offset = seg.sel & ~7
        if offset + len(wanted) - 1 > system.gdtr.limit:
            problems.append(f"seg.{name}.sel: beyond the limit of the GDT")
        elif _read(memory, system.gdtr.base + offset, len(wanted)) != wanted:
            problems.append(f"seg.{name}: differs from its descriptor in the GDT")
    return problems


def _read(memory: Memory, addr: int, size: int) -> bytes:
    """Bytes of memory; absent pages read as zeros."""
    pages = memory.pages
    return bytes(pages[a >> 12][a & 0xFFF] if a >> 12 in pages else 0 for a in range(addr, addr + size))
