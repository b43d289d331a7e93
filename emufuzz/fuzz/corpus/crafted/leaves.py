"""Every legal leaf in every mode, in the smallest state that it can be decoded in."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Final

from emufuzz.arch.modes import MODES
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_CS, VCPU_SREG_DS, VCPU_SREG_SS
from emufuzz.case.build import CODE_BASE, CODE_BITS, build_system
from emufuzz.case.model import UNUSABLE, Case, Memory, System
from emufuzz.emulator.flags import MemAbs, NoMod
from emufuzz.fuzz.corpus.legal import legal_pairs
from emufuzz.fuzz.encode import effect_of
from emufuzz.fuzz.forms import MOD_MEMORY, MOD_REGISTER, Form, forms

_MANDATORY: Final = {"66": b"\x66", "f2": b"\xf2", "f3": b"\xf3"}
#: One page of data and stack, to which all registers point.
_PAGE: Final = Memory(((0, b""),))
_GPR: Final = tuple(0x800 if i == VCPU_REGS_RSP else 0 for i in range(16))
_KEPT: Final = (VCPU_SREG_CS, VCPU_SREG_SS, VCPU_SREG_DS)


def leaf_cases() -> Iterator[Case]:
    """One case per leaf and mode."""
    for mode in MODES:
        done = set()
        for form in forms():
            usable = form.mode64 in (None, mode == "prot64")
            if usable and (form.leaf, mode) in legal_pairs() and form.leaf not in done:
                done.add(form.leaf)
                vm = 0x20000 if mode == "vm86" else 0
                yield Case("", mode, encoded(form, mode), _GPR, CODE_BASE, 2 | vm, _system(mode), _PAGE)


@cache
def _system(mode: str) -> System:
    """Mode, code segment and CPL, and what a flat stack and data need."""
    full = build_system(mode)
    seg = tuple(segment if i in _KEPT else UNUSABLE for i, segment in enumerate(full.seg))
    return System(seg=seg, cr0=full.cr0, cr4=full.cr4, efer=full.efer)


def encoded(form: Form, mode: str) -> bytes:
    """The form with register 3 (or memory at it), and zeros for the rest."""
    bits = CODE_BITS.get(mode, 16)
    run = _MANDATORY.get(form.prefix, b"")
    size = effect_of(bits, run)
    code = run + form.opcode
    if form.has_modrm:
        registers = form.mod == MOD_REGISTER or form.d & NoMod or (form.mod != MOD_MEMORY and form.rm >= 0)
        low = form.rm if form.rm >= 0 else 7 if bits == 16 and not registers else 3
        code += bytes(((0xC0 if registers else 0) | max(form.reg, 0) << 3 | low,))
    immediate = form.immediate_bytes(form.operand_bytes(size.op_bytes, bits), size.ad_bytes)
    return code + bytes(size.ad_bytes if form.d & MemAbs else immediate)
