"""Builders of valid machine states for the seven modes.

    code  0x6000 0x7000          data  0x8000 0x9000 0xa000          stack  0xc000
    GDT   0x1000   LDT 0x2000    IDT   0x3000          TSS  0x4000

Linear addresses, the same in every mode and all below 64 KiB, within reach of every address size;
0xb000 and 0xd000 are absent. A variant is `build_system` with segments of one's own: it puts their
descriptors into the GDT, so that a state stays consistent (emufuzz.case.check says what that is).
The fuzzer has environments of its own, cut for speed (emufuzz.fuzz.environments).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from emufuzz.arch import cr, rflags
from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import (
    GPR_NAMES,
    SREG_NAMES,
    VCPU_REGS_RSP,
)
from emufuzz.case.model import (
    Case,
    Memory,
    Segment,
    System,
    TableRegister,
)
from emufuzz.case.paging import identity_tables
from emufuzz.case.segments import (
    TYPE_LDT,
    TYPE_TSS16_BUSY,
    TYPE_TSS_BUSY,
    gdt_bytes,
    segment_code,
    segment_data,
    segment_paragraph,
    tss_bytes,
)

GDT_BASE: Final = 0x1000
LDT_BASE: Final = 0x2000
IDT_BASE: Final = 0x3000
TSS_BASE: Final = 0x4000
CODE_BASE: Final = 0x6000
DATA_BASE: Final = 0x8000
STACK_BASE: Final = 0xC000
STACK_TOP: Final = 0xC800
PAGE_TABLES: Final = 0x100000  # first page table of a case with `phys`

CODE_PAGES: Final = (0x6000, 0x7000)
DATA_PAGES: Final = (0x8000, 0x9000, 0xA000)
STACK_PAGES: Final = (0xC000,)

#: Slots of the GDT; four per kind, one for each CPL.
_CODE_SEL: Final = 0x08
_DATA_SEL: Final = 0x28
_TR_SEL: Final = 0x50
_LDT_SEL: Final = 0x70

LONG_MODES: Final = ("compat16", "compat32", "prot64")
CODE_BITS: Final = {"prot32": 32, "compat32": 32, "prot64": 64}


def cpls_of(mode: str) -> tuple[int, ...]:
    """The privilege levels that a mode has."""
    return {"real": (0,), "vm86": (3,)}.get(mode, (0, 1, 2, 3))


def build_segments(mode: str, cpl: int) -> dict[str, Segment]:
    """Flat segments for a mode and privilege level, by name; ES to GS, TR and LDTR.

    Raises:
        ValueError: an unknown mode, or a privilege level that it does not have.
    """
    if mode not in MODES:
        raise ValueError(f"{mode} is not one of {', '.join(MODES)}")
    if cpl not in cpls_of(mode):
        raise ValueError(f"{mode} has no CPL {cpl}")
    if mode in ("real", "vm86"):
        seg = dict.fromkeys(SREG_NAMES[:6], segment_paragraph(0, vm86=mode == "vm86"))
        seg["cs"] = segment_paragraph(0, vm86=mode == "vm86", code=True)
    else:
        code, data = _flat_pair(mode, cpl)
        seg = {**dict.fromkeys(SREG_NAMES[:6], data), "cs": code}
    seg["tr"] = _task_segment(mode)
    seg["ldtr"] = Segment(_LDT_SEL, LDT_BASE, 0x7F, TYPE_LDT, p=1)
    return seg


def _task_segment(mode: str) -> Segment:
    if mode == "real":  # TR as it is after reset (SDM Vol. 3A Table 9-1)
        return Segment(0, 0, 0xFFFF, TYPE_TSS16_BUSY, p=1)
    size = len(tss_bytes(bits=64 if mode in LONG_MODES else 32))
    return Segment(_TR_SEL, TSS_BASE, size - 1, TYPE_TSS_BUSY, p=1)


def build_system(mode: str, cpl: int | None = None, **changes: Any) -> System:
    """A consistent System of a mode; `cpl` defaults to 0 (3 in vm86).

    Args:
        mode: one of emufuzz.arch.modes.MODES.
        cpl: privilege level.
        changes: fields of System to replace; and by their names segment registers (`ds=...`).

    Raises:
        ValueError: an unknown mode, or a privilege level that it does not have.
    """
    if cpl is None:
        cpl = 3 if mode == "vm86" else 0
    segments = build_segments(mode, cpl)
    segments |= {name: changes.pop(name) for name in SREG_NAMES if name in changes}
    fields: dict[str, Any] = {
        "seg": tuple(segments[name] for name in SREG_NAMES),
        "gdtr": TableRegister(GDT_BASE, len(_gdt_of(mode, segments.values())) - 1),
        "idtr": TableRegister(IDT_BASE, 0x3FF if mode == "real" else 0xFFF),
        "xcr0": 3,
        "dr": (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400),
        **_control_registers(mode),
    }
    return System(**{**fields, **changes})


def _control_registers(mode: str) -> dict[str, int]:
    cr0 = cr.X86_CR0_ET | cr.X86_CR0_NE | cr.X86_CR0_MP
    cr4 = cr.X86_CR4_OSFXSR | cr.X86_CR4_OSXMMEXCPT
    if mode == "real":
        return {"cr0": cr0, "cr4": cr4}
    cr0 |= cr.X86_CR0_PE | cr.X86_CR0_PG | cr.X86_CR0_WP
    if mode not in LONG_MODES:
        return {"cr0": cr0, "cr3": PAGE_TABLES, "cr4": cr4}
    return {
        "cr0": cr0,
        "cr3": PAGE_TABLES,
        "cr4": cr4 | cr.X86_CR4_PAE,
        "efer": cr.EFER_SCE | cr.EFER_LME | cr.EFER_LMA | cr.EFER_NX,
    }


def _gdt_of(mode: str, segments: Iterable[Segment]) -> bytes:
    usual = segments if mode in ("real", "vm86") else [*_all_levels(mode), *segments]
    described = [s for s in usual if not (mode in ("real", "vm86") and s.s)]
    return gdt_bytes(described, long_mode=mode in LONG_MODES)


def _all_levels(mode: str) -> list[Segment]:
    """Code and data of every CPL, so that far transfers and segment loads find something."""
    return [segment for cpl in cpls_of(mode) for segment in _flat_pair(mode, cpl)]


def _flat_pair(mode: str, cpl: int) -> tuple[Segment, Segment]:
    """The flat code and data segment of a protected or long mode at one privilege level."""
    bits = CODE_BITS.get(mode, 16)
    return (
        segment_code(_CODE_SEL + 8 * cpl | cpl, bits=bits, dpl=cpl),
        segment_data(_DATA_SEL + 8 * cpl | cpl, bits=bits, dpl=cpl),
    )


def build_memory(mode: str, system: System, data: Mapping[int, bytes] | None = None) -> Memory:
    """The pages of the default layout with tables that agree with `system`, and `data` laid over them.

    `data` maps linear addresses to bytes; empty bytes make a page of zeros.
    """
    entries = [(page, b"") for page in (*CODE_PAGES, *DATA_PAGES, *STACK_PAGES)]
    if mode != "real":
        bits = 64 if mode in LONG_MODES else 32
        entries += [
            (system.gdtr.base, _gdt_of(mode, system.seg)),
            (LDT_BASE, bytes(0x80)),
            (IDT_BASE, b""),
            (TSS_BASE, tss_bytes(bits=bits, sp0=STACK_TOP, ss0=_DATA_SEL)),
        ]
    entries += (data or {}).items()
    return Memory(tuple(entries))


def build_case(
    mode: str,
    code: bytes,
    *,
    id: str = "",  # noqa: A002 - the field's name in the exchange format
    cpl: int | None = None,
    rip: int = CODE_BASE,
    flags: int = 0,
    system: System | None = None,
    data: Mapping[int, bytes] | None = None,
    mem: Memory | None = None,
    physical: bool = False,
    **gpr: int,
) -> Case:
    """A case in the default layout; registers by name (`rax=1`), RSP defaults to the stack's middle.

    Args:
        mode: one of emufuzz.arch.modes.MODES.
        code: the instruction's bytes.
        id: name of the case.
        cpl: privilege level, for the default system.
        rip: where the code lies, as an offset into CS.
        flags: RFLAGS without bit 1 and, in vm86, VM, which are always set.
        system: instead of the default one.
        data: linear address -> bytes, laid over the default pages.
        mem: instead of the default pages.
        physical: give the memory as `phys`, with identity page tables if paging is on.
        gpr: general-purpose registers.

    Raises:
        ValueError: an unknown mode or register, or a privilege level that the mode does not have.
    """
    unknown = gpr.keys() - set(GPR_NAMES)
    if unknown:
        raise ValueError(f"{min(unknown)} is not a general-purpose register")
    system = system or build_system(mode, cpl)
    regs = [gpr.get(name, 0) for name in GPR_NAMES]
    if "rsp" not in gpr:
        regs[VCPU_REGS_RSP] = STACK_TOP
    memory = mem if mem is not None else build_memory(mode, system, data)
    vm = rflags.X86_EFLAGS_VM if mode == "vm86" else 0
    return Case(
        id=id,
        mode=mode,
        code=code,
        gpr=tuple(regs),
        rip=rip,
        rflags=flags | rflags.X86_EFLAGS_FIXED | vm,
        system=system,
        mem=Memory() if physical else memory,
        extra={"phys": _physical(system, memory)} if physical else None,
    )


def _physical(system: System, memory: Memory) -> list[dict[str, str]]:
    """`phys` entries: the memory, and identity page tables for it at CR3 if paging is on."""
    entries = list(memory.entries)
    if system.cr0 & cr.X86_CR0_PG:
        pages = [pfn << 12 for pfn in memory.pages]
        entries += identity_tables(paging_kind(system), system.cr3 & ~0xFFF, pages)
    return [
        {"addr": hex(addr), "data": data.hex()} if data else {"addr": hex(addr)} for addr, data in entries
    ]


def paging_kind(system: System) -> str:
    """The kind of page tables that CR4.PAE and EFER.LMA select (SDM Vol. 3A 4.1.1)."""
    if system.efer & cr.EFER_LMA:
        return "4-level"
    return "pae" if system.cr4 & cr.X86_CR4_PAE else "2-level"
