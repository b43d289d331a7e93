"""Register preparations: give an instruction operands with which it does something interesting.

Random registers make DIV overflow, REP run for hours and XLAT fault nearly always. Each function
here changes a register file in place, most of the time, for one kind of instruction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from emufuzz.arch.regs import (
    VCPU_REGS_RAX,
    VCPU_REGS_RBP,
    VCPU_REGS_RBX,
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RDX,
    VCPU_REGS_RSI,
    VCPU_REGS_RSP,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
)
from emufuzz.fuzz.environments import Environment

MASK64: Final = 0xFFFFFFFFFFFFFFFF


class Encoding(NamedTuple):
    """The instruction for which registers are prepared.

    `rm` is the register operand in ModRM.rm (-1 = memory), `ea` the effective address (-1 = none).
    """

    env: Environment
    op_bytes: int
    ad_bytes: int
    seg: int
    reg: int
    rm: int
    ea: int
    rep: int


#: (registers, instruction, 32 random bits)
Prepare: TypeAlias = Callable[[list[int], Encoding, int], None]

_COUNTS: Final = (0, 1, 2, 3, 4, 5, 7, 8) * 6 + (9, 15, 16, 17, 20, 24, 31, 32, 33, 40, 63, 64, 65, 70, 96, 0)
_SHIFTS: Final = (
    0, 1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 16, 17, 18, 20, 24, 27, 31, 32, 33, 34, 40, 48, 62, 63,
    64, 65, 0xFF,
)  # fmt: skip
_LOOPS: Final = (0, 1, 1, 2, 3, 0x10000, 0x10001, 0x100000000, 0x100000001, MASK64, 0x80000000, 0xFFFF,
                 1, 2, 0, 5)  # fmt: skip
_BIT_OFFSETS: Final = (0, 1, 7, 8, 15, 16, 31, 32, 63, 64, 65, 100, 127, 128, 255, 1000)


def _merge(old: int, value: int, size: int) -> int:
    """`value` in the low `size` bytes (2, 4, 8), what `old` had above them."""
    mask = (1 << size * 8) - 1
    return old & ~mask | value & mask


def _targets(env: Environment, ad_bytes: int, seg: int) -> tuple[int, ...]:
    return (env.targets16 if ad_bytes == 2 else env.targets)[seg]


def prepare_string(regs: list[int], insn: Encoding, bits: int) -> None:
    """SI and DI into data, a small count: REP over long runs only costs time."""
    env, ad_bytes = insn.env, insn.ad_bytes
    source = _targets(env, ad_bytes, VCPU_SREG_DS if insn.seg < 0 else insn.seg)[bits & 255]
    target = _targets(env, ad_bytes, VCPU_SREG_ES)[bits >> 8 & 255]
    regs[VCPU_REGS_RSI] = _merge(regs[VCPU_REGS_RSI], source, ad_bytes)
    regs[VCPU_REGS_RDI] = _merge(regs[VCPU_REGS_RDI], target, ad_bytes)
    if insn.rep:
        count = _COUNTS[bits >> 16 & 63]
        keep_high = bits >> 22 & 3 == 0
        regs[VCPU_REGS_RCX] = _merge(regs[VCPU_REGS_RCX] if keep_high else 0, count, ad_bytes)


def prepare_xlat(regs: list[int], insn: Encoding, bits: int) -> None:
    """RBX + AL into data."""
    seg = VCPU_SREG_DS if insn.seg < 0 else insn.seg
    target = _targets(insn.env, insn.ad_bytes, seg)[bits & 255]
    regs[VCPU_REGS_RBX] = _merge(regs[VCPU_REGS_RBX], target - (regs[VCPU_REGS_RAX] & 0xFF), insn.ad_bytes)


def prepare_bit_offset(regs: list[int], insn: Encoding, bits: int) -> None:
    """A bit offset that stays near the operand, mostly."""
    if insn.rm < 0 and bits & 7:
        offset = _BIT_OFFSETS[bits >> 3 & 15]
        regs[insn.reg] = _merge(regs[insn.reg], -offset if bits & 0x80 else offset, insn.op_bytes)


def prepare_count(regs: list[int], insn: Encoding, bits: int) -> None:  # noqa: ARG001 - one signature for all
    """A shift count around the operand sizes."""
    regs[VCPU_REGS_RCX] = regs[VCPU_REGS_RCX] & ~0xFF | _SHIFTS[bits & 31]


def prepare_dividend(regs: list[int], insn: Encoding, bits: int) -> None:
    """A high half that is zero or a sign extension in three of four cases: the quotient then fits."""
    choice = bits & 3
    if not choice:
        return
    regs[VCPU_REGS_RDX] = _merge(regs[VCPU_REGS_RDX], -(choice == 2), insn.op_bytes)
    if bits & 4:
        regs[VCPU_REGS_RAX] &= ~0xFF00


def prepare_loop(regs: list[int], insn: Encoding, bits: int) -> None:
    """A count at which the loop ends, or nearly."""
    regs[VCPU_REGS_RCX] = _LOOPS[bits & 15] & (MASK64 if insn.env.bits == 64 else 0xFFFFFFFF)


def prepare_frame(regs: list[int], insn: Encoding, bits: int) -> None:
    """RBP into the stack."""
    if bits & 7:
        regs[VCPU_REGS_RBP] = insn.env.stacks[bits >> 3 & 255]


def prepare_branch(regs: list[int], insn: Encoding, bits: int) -> None:
    """A register target inside the code segment."""
    if insn.rm >= 0 and insn.rm != VCPU_REGS_RSP:
        regs[insn.rm] = insn.env.branches[bits & 255]


def prepare_cmpxchg(regs: list[int], insn: Encoding, bits: int) -> None:
    """In half of the cases the accumulator equals the destination."""
    if bits & 1:
        return
    if insn.rm >= 0:
        regs[VCPU_REGS_RAX] = regs[insn.rm]
        return
    seg = insn.env.system.seg[insn.seg if insn.seg >= 0 else VCPU_SREG_DS]
    page = insn.env.mem.pages.get(seg.base + insn.ea >> 12)
    offset = seg.base + insn.ea & 0xFFF
    if page is not None:
        value = int.from_bytes(page[offset : offset + insn.op_bytes], "little")
        regs[VCPU_REGS_RAX] = _merge(regs[VCPU_REGS_RAX], value, insn.op_bytes)
