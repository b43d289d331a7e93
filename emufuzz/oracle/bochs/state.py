"""Bochs' CPU state of a System, and back.

Only what an instruction changed is carried over to the System of an outcome: Bochs rounds some
fields when it loads them, and paging is on behind the back of cases with flat memory (`space`).
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, Final

import msgspec

from emufuzz.arch.cr import (
    EFER_LMA,
    EFER_LME,
    EFER_NX,
    X86_CR0_PG,
    X86_CR4_LA57,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
    X86_CR4_PKE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
)
from emufuzz.arch.fpu import MXCSR_MASK
from emufuzz.arch.regs import SREG_NAMES
from emufuzz.case.model import Fpu, Segment, System, TableRegister
from emufuzz.oracle.bochs.abi import CpuState, SegmentState

#: 16 GPRs, RIP and RFLAGS, behind the seed.
REGISTERS: Final = struct.Struct("<18Q")
REGISTERS_AT: Final = CpuState.rax.offset
SYSTEM_AT: Final = REGISTERS_AT + REGISTERS.size
TSC_AT: Final = CpuState.tsc.offset
_CR3_AT: Final = CpuState.cr3.offset

_HIDDEN_CR4: Final = X86_CR4_LA57 | X86_CR4_PCIDE | X86_CR4_PKE
_USER_CR4: Final = X86_CR4_SMEP | X86_CR4_SMAP
_ALL_TAGS_EMPTY: Final = 0xFFFF
_MMX_EXPONENT: Final = 0xFFFF

# fmt: off
#: MSR index -> field of the state.
STATE_MSRS: Final = {
    0x174:      "sysenter_cs",
    0x175:      "sysenter_esp",
    0x176:      "sysenter_eip",
    0x277:      "pat",
    0xC0000081: "star",
    0xC0000082: "lstar",
    0xC0000083: "cstar",
    0xC0000084: "sfmask",
    0xC0000102: "kernel_gs_base",
    0xC0000103: "tsc_aux",
}
# fmt: on


def cpl_of(system: System, mode: str) -> int:
    """The privilege level (docs/case-format.md): 0 in real mode, 3 in vm86, else SS.DPL."""
    if mode == "real":
        return 0
    return 3 if mode == "vm86" else system.seg[2].dpl


def hidden_kind(system: System, *, exact: bool = False) -> str:
    """Of hidden page tables; with EFER.NXE those that have a bit for it, so that I/D shows in error codes."""
    if system.efer & EFER_LMA:
        return "4-level"
    wide = system.cr4 & X86_CR4_PAE or (system.efer & EFER_NX and not exact)
    return "pae" if wide else "2-level"


class Template:
    """What a System looks like to Bochs.

    Attributes:
        image: The state to load, but for registers and, with hidden tables, CR3.
        loaded: What Bochs says of the state when nothing has run; filled in by the engine.
        hidden: Memory is behind hidden page tables.
        exact: CR0, CR4 and EFER are the case's own, for instructions that show them.
    """

    __slots__ = ("exact", "hidden", "image", "loaded", "mode", "pae", "system")

    def __init__(self, blank: bytes, system: System, mode: str, *, hidden: bool, exact: bool) -> None:
        self.system, self.mode, self.hidden, self.exact = system, mode, hidden, exact
        state = CpuState.from_buffer_copy(blank)
        _put_system(state, system)
        if hidden and not exact:
            state.cr0 |= X86_CR0_PG
            user = cpl_of(system, mode) == 3
            state.cr4 = system.cr4 & ~(_HIDDEN_CR4 | (_USER_CR4 if user else 0))
            if not system.efer & EFER_LMA:
                state.efer = system.efer & ~EFER_LME
            if hidden_kind(system) == "pae":
                state.cr4 |= X86_CR4_PAE
        paged, long = state.cr0 & X86_CR0_PG, state.efer & EFER_LMA
        self.pae = bool(paged and state.cr4 & X86_CR4_PAE and not long)
        self.image = bytes(state)
        self.loaded = b""

    def with_root(self, root: int | None) -> bytes:
        """The image with CR3 as given, or as the case has it."""
        if root is None:
            return self.image
        return self.image[:_CR3_AT] + root.to_bytes(8, "little") + self.image[_CR3_AT + 8 :]

    def expected(self, root: int | None) -> bytes:
        """`loaded` with that CR3."""
        if root is None:
            return self.loaded
        return self.loaded[:_CR3_AT] + root.to_bytes(8, "little") + self.loaded[_CR3_AT + 8 :]


def _put_segment(state: SegmentState, seg: Segment) -> None:
    state.valid, state.sel, state.base, state.limit = bool(seg.p), seg.sel, seg.base, seg.limit
    low = seg.type | seg.s << 4 | seg.dpl << 5 | seg.p << 7
    state.attr = low | seg.avl << 12 | seg.l << 13 | seg.db << 14 | seg.g << 15


def _segment(state: SegmentState) -> Segment:
    """A register that was loaded; one with a null selector is all zero but for that."""
    if not state.valid:
        return Segment(sel=state.sel)
    attr = state.attr
    return Segment(
        sel=state.sel,
        base=state.base,
        limit=state.limit,
        type=attr & 15,
        s=attr >> 4 & 1,
        dpl=attr >> 5 & 3,
        p=attr >> 7 & 1,
        avl=attr >> 12 & 1,
        l=attr >> 13 & 1,
        db=attr >> 14 & 1,
        g=attr >> 15 & 1,
    )


def _put_system(state: CpuState, system: System) -> None:
    for name, seg in zip(SREG_NAMES, system.seg, strict=True):
        _put_segment(getattr(state, name), seg)
    for table, values in ((state.gdtr, system.gdtr), (state.idtr, system.idtr)):
        table.base, table.limit = values.base, values.limit
    for name in ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0"):
        setattr(state, name, getattr(system, name))
    for number in (0, 1, 2, 3, 6, 7):
        setattr(state, f"dr{number}", system.dr[number])
    state.sfmask = 0  # MSRs that a case does not name are 0; after a reset this one is not
    for index, value in system.msr:
        if index in STATE_MSRS:
            setattr(state, STATE_MSRS[index], value)
    _put_fpu(state, system.fpu)


def _put_fpu(state: CpuState, fpu: Fpu) -> None:
    top = fpu.fsw >> 11 & 7
    state.fpcw, state.fpsw, state.mxcsr, state.mxcsr_mask = fpu.fcw, fpu.fsw, fpu.mxcsr, MXCSR_MASK
    tags = _ALL_TAGS_EMPTY
    for physical in range(8):
        value = fpu.mm[physical - top & 7]
        state.fpst[physical].fraction = value
        state.fpst[physical].exponent = _MMX_EXPONENT
        if fpu.ftw >> physical & 1:
            tags &= ~(1 << 2 * physical)  # 2, special: an exponent of all ones
    state.fptw = tags
    for number, value in enumerate(fpu.xmm):
        state.zmm[number][0], state.zmm[number][1] = value & (1 << 64) - 1, value >> 64


def _fpu(state: CpuState) -> Fpu:
    top = state.fpsw >> 11 & 7
    return Fpu(
        fcw=state.fpcw,
        fsw=state.fpsw,
        ftw=sum(1 << i for i in range(8) if state.fptw >> 2 * i & 3 != 3),
        mxcsr=state.mxcsr,
        xmm=tuple(state.zmm[n][0] | state.zmm[n][1] << 64 for n in range(16)),
        mm=tuple(state.fpst[top + slot & 7].fraction for slot in range(8)),
    )


def read_system(after: bytes, before: bytes, template: Template) -> System:
    """The System after a run; the case's own object if nothing in it changed.

    Args:
        after: What Bochs says now.
        before: What it said of the loaded state.
        template: Of the case.
    """
    if after[SYSTEM_AT:TSC_AT] == before[SYSTEM_AT:TSC_AT] and after[TSC_AT + 8 :] == before[TSC_AT + 8 :]:
        return template.system
    new, old, system = CpuState.from_buffer_copy(after), CpuState.from_buffer_copy(before), template.system
    changes: dict[str, Any] = {
        **_changed_segments(new, old, system),
        **_changed_registers(new, old, template),
        **_changed_msrs(new, old, system),
    }
    if _fpu(new) != (loaded := _fpu(old)):
        changes["fpu"] = _changed_fpu(_fpu(new), loaded, system.fpu)
    result: System = msgspec.structs.replace(system, **changes)
    return system if result == system else result


def _changed_segments(new: CpuState, old: CpuState, system: System) -> dict[str, Any]:
    seg = tuple(
        before if bytes(getattr(new, name)) == bytes(getattr(old, name)) else _segment(getattr(new, name))
        for name, before in zip(SREG_NAMES, system.seg, strict=True)
    )
    tables = {
        name: TableRegister(getattr(new, name).base, getattr(new, name).limit)
        for name in ("gdtr", "idtr")
        if bytes(getattr(new, name)) != bytes(getattr(old, name))
    }
    return {"seg": seg, **tables}


def _changed_registers(new: CpuState, old: CpuState, template: Template) -> dict[str, Any]:
    system = template.system
    changes: dict[str, Any] = {}
    for name in ("cr0", "cr4", "efer", "xcr0"):
        changes[name] = getattr(system, name) ^ getattr(new, name) ^ getattr(old, name)
    for name in ("cr2", "cr3", "cr8"):
        if getattr(new, name) != getattr(old, name):
            changes[name] = getattr(new, name)
    dr = list(system.dr)
    for number in (0, 1, 2, 3, 6, 7):
        value = getattr(new, f"dr{number}")
        if value != getattr(old, f"dr{number}"):
            dr[number] = value
    return {**changes, "dr": tuple(dr)}


def _changed_msrs(new: CpuState, old: CpuState, system: System) -> dict[str, Any]:
    """An MSR that the case does not have does not come into being."""
    values = dict(system.msr)
    for index, name in STATE_MSRS.items():
        value = getattr(new, name)
        if index in values and value != getattr(old, name):
            values[index] = value
    return {"msr": tuple(sorted(values.items()))}


def _changed_fpu(new: Fpu, old: Fpu, before: Fpu) -> Fpu:
    """The case's FPU with what changed."""
    changes = {
        name: getattr(new, name) for name in Fpu.__struct_fields__ if getattr(new, name) != getattr(old, name)
    }
    changed: Fpu = msgspec.structs.replace(before, **changes)
    return changed


def _mask_of(kind: Any) -> bytes:
    """Ones where a type of ctypes has fields, zeros where it has padding."""
    if issubclass(kind, ctypes.Array):
        return _mask_of(kind._type_) * int(kind._length_)
    mask = bytearray(ctypes.sizeof(kind))
    if not issubclass(kind, ctypes.Structure):
        return b"\xff" * len(mask)
    for name, of, *_ in kind._fields_:
        place = getattr(kind, name).offset
        mask[place : place + ctypes.sizeof(of)] = _mask_of(of)
    return bytes(mask)


_FIELDS: Final = int.from_bytes(_mask_of(CpuState), "little")


def without_padding(state: bytes) -> bytes:
    """A state with zeros between its fields, where Bochs leaves whatever was there."""
    return (int.from_bytes(state, "little") & _FIELDS).to_bytes(len(state), "little")


def state_size() -> int:
    """Bytes of a state."""
    return ctypes.sizeof(CpuState)
