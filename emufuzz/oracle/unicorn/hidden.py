"""Control registers as the guest sees them, where the engine's own serve hidden page tables.

Without physical memory CR0, CR3, CR4 and EFER of the engine differ from those of the case in the
bits that switch the hidden page tables on. An instruction that reads such a register gets these
bits of the case; what one writes counts as it is written, whatever it does to the hidden tables.
Debug registers lie outside of what an ordinary run looks at, and are read after a write to them.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from emufuzz.arch.cr import EFER_NX
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX
from emufuzz.arch.rflags import X86_EFLAGS_TF
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.unicorn.image import HIDDEN_CR0, HIDDEN_CR4, cpl_of
from emufuzz.oracle.unicorn.layout import Layout
from emufuzz.oracle.unicorn.prefixes import split_prefixes

#: Bytes without which an instruction has no `hidden_access`.
_may_access: Final = re.compile(rb"\x0f[\x01\x20\x22\x23\x30\x32]").search

MSR_EFER: Final = 0xC0000080
_MASK32: Final = (1 << 32) - 1
_MASK64: Final = (1 << 64) - 1
_HIDDEN: Final = {"cr0": HIDDEN_CR0, "cr3": _MASK64, "cr4": HIDDEN_CR4, "efer": EFER_NX}
_CONTROL: Final = {0: "cr0", 2: "cr2", 3: "cr3", 4: "cr4"}
_ENABLED: Final = 0xFF  # DR7: the bits that enable breakpoints
_SMSW: Final = range(0xE0, 0xE8)


@dataclass(frozen=True, slots=True)
class HiddenAccess:
    """An access to a register that the engine has otherwise than the case, or keeps elsewhere.

    Attributes:
        register: `cr0`, `cr2`, `cr3`, `cr4`, `efer`, or `dr` for all debug registers.
        write: Whether it is written, else it is read.
        gpr: The general register that gets what is read.
        mask: Which bits of it.
    """

    register: str
    write: bool
    gpr: int = 0
    mask: int = _MASK64

    @property
    def stepping(self) -> bool:
        """Whether the next instruction must not be looked up: the write may change how that is done."""
        return self.write and self.register not in {"cr2", "dr"}


def modrm_registers(case: Case) -> tuple[int, int]:
    """(reg, rm) of an opcode of two bytes, extended by REX; (-1, -1) if there is no ModRM."""
    prefixes, rest = split_prefixes(case.code, case.mode)
    if len(rest) < 3:
        return -1, -1
    last = prefixes[-1] if prefixes and case.mode == "prot64" else 0
    rex = last if last & 0xF0 == 0x40 else 0
    return rest[2] >> 3 & 7 | (rex & 4) << 1, rest[2] & 7 | (rex & 1) << 3


def hidden_access(case: Case) -> HiddenAccess | None:
    """How the instruction of a case accesses such a register; None if it does not."""
    if not _may_access(case.code):
        return None
    prefixes, rest = split_prefixes(case.code, case.mode)
    opcode = rest[:2]
    if opcode in {b"\x0f\x30", b"\x0f\x32"}:
        if case.gpr[VCPU_REGS_RCX] & _MASK32 != MSR_EFER:
            return None
        return HiddenAccess("efer", opcode == b"\x0f\x30", VCPU_REGS_RAX, _MASK32)
    if opcode == b"\x0f\x23":
        return HiddenAccess("dr", write=True)
    reg, rm = modrm_registers(case)
    if opcode == b"\x0f\x01" and rest[2:3] and rest[2] in _SMSW:
        return HiddenAccess("cr0", write=False, gpr=rm, mask=_smsw_mask(case, prefixes))
    if opcode not in {b"\x0f\x20", b"\x0f\x22"} or reg not in _CONTROL:
        return None
    mask = _MASK64 if case.mode == "prot64" else _MASK32
    return HiddenAccess(_CONTROL[reg], opcode == b"\x0f\x22", rm, mask)


def _smsw_mask(case: Case, prefixes: bytes) -> int:
    if case.mode == "prot64" and prefixes[-1:] and prefixes[-1] & 0xF8 == 0x48:
        return _MASK64
    return _MASK32 if case.mode == "prot64" and 0x66 not in prefixes else 0xFFFF


def prepared(case: Case, access: HiddenAccess) -> Case:
    """The case with TF such that the run ends where it must; a trap would take back DR6 and CR2."""
    if not access.write:
        return case
    rflags = case.rflags | X86_EFLAGS_TF if access.stepping else case.rflags & ~X86_EFLAGS_TF
    return msgspec.structs.replace(case, rflags=rflags)


def show(case: Case, access: HiddenAccess, outcome: Outcome, state: memoryview, layout: Layout) -> Outcome:
    """The outcome as the guest sees it; `state` is the engine's, saved after the run."""
    if access.write:
        outcome.rflags = outcome.rflags & ~X86_EFLAGS_TF | case.rflags & X86_EFLAGS_TF
    if outcome.exception is not None or outcome.unchecked:
        return outcome
    if access.write:
        changes = {access.register: _register(access.register, state, layout)}
        after = msgspec.structs.replace(outcome.system, **changes)
        outcome.system = case.system if after == case.system else after
    elif access.register in _HIDDEN:
        hidden = _HIDDEN[access.register] & access.mask
        gpr = list(outcome.gpr)
        gpr[access.gpr] = gpr[access.gpr] & ~hidden | getattr(case.system, access.register) & hidden
        outcome.gpr = tuple(gpr)
    return outcome


def _register(name: str, state: memoryview, layout: Layout) -> Any:
    if name == "dr":
        return struct.unpack_from("<8Q", state, layout.dr)
    place = layout.efer if name == "efer" else layout.cr + int(name[2:]) * 8
    return struct.unpack_from("<Q", state, place)[0]


def debug_move_is_safe(case: Case) -> bool:
    """Whether MOV to a debug register sets no breakpoint and takes none back, neither of which lasts."""
    if cpl_of(case.system, case.mode):
        return True
    number, source = modrm_registers(case)
    enables = number in {5, 7} and case.gpr[source] & _ENABLED
    return not enables and not case.system.dr[7] & _ENABLED
