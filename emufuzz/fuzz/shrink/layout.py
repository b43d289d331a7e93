"""Where the parts of a case's first instruction lie: prefixes, ModRM, SIB, displacement, immediate.

By the emulator's own opcode maps, so that what the emulator takes for an operand is one here
(SDM Vol. 2A 2.1, tables 2-1 to 2-3).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.case.model import Case
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.oracle.native_view import forced_prefix

_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
MASK64: Final = 0xFFFFFFFFFFFFFFFF
_NONE: Final = -1


class Layout(NamedTuple):
    """Offsets into the code; -1 where there is no such part.

    Attributes:
        start: First byte of the instruction, behind a prefix of forced emulation.
        opcode: First byte of the opcode, behind the prefixes.
        modrm: The ModRM byte.
        sib: The SIB byte.
        disp: The displacement; where the immediate starts if there is none.
        imm: What follows all of these: the immediate, or nothing.
        ad_bytes: Size of addresses: 2, 4 or 8.
        rex: The REX prefix, 0 without.
    """

    start: int
    opcode: int
    modrm: int
    sib: int
    disp: int
    imm: int
    ad_bytes: int
    rex: int

    def is_memory(self, code: bytes) -> bool:
        """There is a ModRM byte that names memory."""
        return self.modrm >= 0 and code[self.modrm] < 0xC0


def layout_of(case: Case) -> Layout | None:
    """The layout of the first instruction; None if its bytes end before the immediate."""
    code, long = case.code, case.mode == "prot64"
    start = len(forced_prefix(case))
    at, rex, small = start, 0, False
    while at < len(code) and (code[at] in _PREFIXES or (long and code[at] & 0xF0 == 0x40)):
        rex = code[at] if code[at] & 0xF0 == 0x40 else 0
        small |= code[at] == 0x67
        at += 1
    ad_bytes = _address_size(case, small=small)
    behind = _behind_opcode(code, at)
    if behind is None:
        return None
    position, has_modrm = behind
    if not has_modrm:
        return Layout(start, at, _NONE, _NONE, position, position, ad_bytes, rex)
    return _with_modrm(code, Layout(start, at, position, _NONE, _NONE, _NONE, ad_bytes, rex))


def _address_size(case: Case, *, small: bool) -> int:
    if case.mode == "prot64":
        return 4 if small else 8
    wide = bool(case.system.seg[VCPU_SREG_CS].db)
    return 4 if wide != small else 2


def _behind_opcode(code: bytes, at: int) -> tuple[int, bool] | None:
    """Offset behind the opcode bytes, and whether a ModRM byte is there; None if the code ends before."""
    table = ONE_BYTE
    if code[at : at + 2] == b"\x0f\x38":
        table, at = THREE_BYTE, at + 2
    elif code[at : at + 1] == b"\x0f":
        table, at = TWO_BYTE, at + 1
    if at >= len(code):
        return None
    return at + 1, table[code[at]].has_modrm


def _with_modrm(code: bytes, layout: Layout) -> Layout | None:
    at = layout.modrm + 1
    if at > len(code):
        return None
    mod, rm, sib = code[layout.modrm] >> 6, code[layout.modrm] & 7, _NONE
    base = rm
    if mod != 3 and layout.ad_bytes != 2 and rm == 4:
        if at >= len(code):
            return None
        sib, base = at, code[at] & 7
        at += 1
    imm = at + _displacement(mod, rm if layout.ad_bytes == 2 else base, layout.ad_bytes)
    return None if imm > len(code) else layout._replace(sib=sib, disp=at, imm=imm)


def _displacement(mod: int, base: int, ad_bytes: int) -> int:
    """Bytes of displacement (SDM Vol. 2A tables 2-1 and 2-2)."""
    full = 2 if ad_bytes == 2 else 4
    if mod == 1:
        return 1
    if mod == 2:
        return full
    return full if mod == 0 and base == (6 if ad_bytes == 2 else 5) else 0


#: 16-bit addressing, by ModRM.rm: the registers that are added up, by their VCPU_REGS_* numbers.
_PAIRS: Final = ((3, 6), (3, 7), (5, 6), (5, 7), (6,), (7,), (5,), (3,))


def effective_address(case: Case, layout: Layout) -> int:
    """The effective address of the memory operand, truncated to the address size."""
    code, gpr = case.code, case.gpr
    mod, rm = code[layout.modrm] >> 6, code[layout.modrm] & 7
    raw = code[layout.disp : layout.imm]
    address = int.from_bytes(raw, "little", signed=True)
    if layout.ad_bytes == 2:
        if mod or rm != 6:
            address += sum(gpr[nr] for nr in _PAIRS[rm])
    elif layout.sib >= 0:
        address += _indexed(case, layout, mod)
    elif mod == 0 and rm == 5:
        address += case.rip + len(code) if case.mode == "prot64" else 0
    else:
        address += gpr[rm | (layout.rex & 1) << 3]
    return address & (1 << layout.ad_bytes * 8) - 1


def _indexed(case: Case, layout: Layout, mod: int) -> int:
    sib, gpr = case.code[layout.sib], case.gpr
    index = sib >> 3 & 7 | (layout.rex & 2) << 2
    total = 0 if index == 4 else gpr[index] << (sib >> 6)
    if mod or sib & 7 != 5:
        total += gpr[sib & 7 | (layout.rex & 1) << 3]
    return total
