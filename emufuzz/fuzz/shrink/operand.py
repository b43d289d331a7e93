"""Memory operands in simpler forms: a register, an address, one register without displacement."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.case.model import Case
from emufuzz.fuzz.shrink.fields import with_code, with_parts
from emufuzz.fuzz.shrink.layout import MASK64, Layout, effective_address

#: Registers that stand for a memory operand: RAX, RCX, RBX.
_PLAIN_REGISTERS: Final = (0, 1, 3)


def _rank(case: Case, layout: Layout) -> int:
    """How complicated a memory operand is: 1 = an address, 2 = one register, 3 = all else."""
    mod, rm = case.code[layout.modrm] >> 6, case.code[layout.modrm] & 7
    if layout.sib >= 0:
        return 1 if not mod and case.code[layout.sib] == 0x25 else 3
    if mod:
        return 3
    if rm == (6 if layout.ad_bytes == 2 else 5):
        return 3 if case.mode == "prot64" else 1  # relative to RIP
    return 2 if layout.ad_bytes != 2 or len(_single(rm)) == 1 else 3


def _single(rm: int) -> tuple[int, ...]:
    return (rm,) if rm in {4, 5, 7} else ()


def simpler_forms(case: Case, layout: Layout) -> Iterator[Case]:
    """The case with simpler operands than its memory operand, the simplest first."""
    head, modrm = case.code[: layout.modrm], case.code[layout.modrm] & 0x38
    tail = case.code[layout.imm :]
    for register in _PLAIN_REGISTERS:
        yield with_code(case, head + bytes((0xC0 | modrm | register,)) + tail)
    rank, address = _rank(case, layout), effective_address(case, layout)
    if rank > 1:
        absolute = absolute_operand(layout, modrm, address)
        if absolute is not None:
            yield with_code(case, head + absolute + tail)
    if rank > 2:
        rm, register = (7, 3) if layout.ad_bytes == 2 else (0, (layout.rex & 1) << 3)
        simple = with_code(case, head + bytes((modrm | rm,)) + tail)
        yield with_parts(simple, {("gpr", GPR_NAMES[register]): address})


def absolute_operand(layout: Layout, modrm: int, address: int) -> bytes | None:
    """ModRM and displacement of an address; None if no displacement reaches it."""
    if layout.ad_bytes == 2:
        return bytes((modrm | 6,)) + address.to_bytes(2, "little")
    if layout.ad_bytes == 8 and ((address + 0x80000000) & MASK64) >> 32:
        return None
    form = bytes((modrm | 5,)) if layout.ad_bytes == 4 and not layout.rex else bytes((modrm | 4, 0x25))
    return form + (address & 0xFFFFFFFF).to_bytes(4, "little")


def at_address(case: Case, layout: Layout, address: int) -> Case | None:
    """The case with a memory operand of that effective address; None if no displacement reaches it."""
    operand = absolute_operand(layout, case.code[layout.modrm] & 0x38, address)
    if operand is None:
        return None
    return with_code(case, case.code[: layout.modrm] + operand + case.code[layout.imm :])
