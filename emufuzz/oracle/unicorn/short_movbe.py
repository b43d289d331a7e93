"""MOVBE in 16-bit code, which Unicorn runs with the operand size of 32-bit code: a MOV stands in.

MOV has the operand size that it should have. With as many more prefixes as its opcode is shorter it is as
long, and the bytes of the register are put in the other order around it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
from iced_x86 import Mnemonic, Register, RegisterExt

from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.case.model import PAGE_SHIFT, Case, Outcome, code_address
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import forced_prefix, judge_case

_MOVBE: Final = (b"\x0f\x38\xf0", b"\x0f\x38\xf1")
_MOV: Final = (b"\x8b", b"\x89")
_SEGMENTS: Final = b"\x26\x2e\x36\x3e\x64\x65"
_SS, _DS = 0x36, 0x3E


class Move(NamedTuple):
    """The case with MOV; `number` is the register, `size` the operand's, `loads` whether it is loaded."""

    case: Case
    number: int
    size: int
    loads: bool

    def finished(self, case: Case, outcome: Outcome) -> Outcome:
        """The outcome of the case that it stands for, of which `outcome` is its own."""
        if outcome.rip != judge_case(case).rip or not self.loads:
            outcome.gpr = _turned(tuple(outcome.gpr), self.number, self.size)
        return outcome


def is_short(case: Case) -> bool:
    """At a glance: 16-bit code in which MOVBE may be."""
    code = case.code
    if case.mode == "prot64" or (_MOVBE[0] not in code and _MOVBE[1] not in code):
        return False
    return not case.system.seg[VCPU_SREG_CS].db


def as_move(case: Case) -> Move | None:
    """The case with MOV instead of MOVBE, None if it has none or if that would show.

    It would where the operand is in a page of the code, or where the address depends on what is stored.
    """
    view = judge_case(case)
    instruction = CaseInstruction(view)
    if not is_short(case) or instruction.mnemonic != Mnemonic.MOVBE or len(instruction.accesses) != 1:
        return None
    (access,), decoded = instruction.accesses, instruction.decode(lax=True)
    loads = instruction.opcode[:3] == _MOVBE[0]
    register = decoded.op0_register if loads else decoded.op1_register
    number, size = RegisterExt.number(register), RegisterExt.size(register)
    base, index = decoded.memory_base, decoded.memory_index
    if not loads and number in {RegisterExt.number(r) for r in (base, index) if r != Register.NONE}:
        return None
    pages = {place >> PAGE_SHIFT for place in (access.linear, access.linear + size - 1)}
    first = code_address(view)
    if pages & {first >> PAGE_SHIFT, first + len(view.code) - 1 >> PAGE_SHIFT}:
        return None
    prefixes = instruction.prefixes
    named = [byte for byte in prefixes if byte in _SEGMENTS]
    more = named[-1] if named else _SS if access.segment == VCPU_SREG_SS else _DS
    code = bytes((more, more)) + prefixes + _MOV[not loads] + instruction.opcode[3:]
    moved = msgspec.structs.replace(case, code=forced_prefix(case) + code)
    if not loads:
        moved = msgspec.structs.replace(moved, gpr=_turned(case.gpr, number, size))
    return Move(moved, number, size, loads)


def run_as_move(case: Case, run: Callable[[Case], Outcome]) -> Outcome:
    """The outcome of a case with MOVBE in 16-bit code, or that of any other case."""
    move = as_move(case) if is_short(case) else None
    return run(case) if move is None else move.finished(case, run(move.case))


def _turned(gpr: tuple[int, ...], number: int, size: int) -> tuple[int, ...]:
    """The registers with the low bytes of one in the other order."""
    low = gpr[number] & (1 << size * 8) - 1
    value = gpr[number] ^ low | int.from_bytes(low.to_bytes(size, "little"), "big")
    return (*gpr[:number], value, *gpr[number + 1 :])
