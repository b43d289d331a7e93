"""The instruction of a case: decoded by iced, and every memory access it makes.

An independent decoder says which memory an instruction touches, through which segment and how; the
case's registers say where that is. Oracles decide with it whether a case is within what they check.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import iced_x86
from iced_x86 import Decoder, InstructionInfoFactory, MemorySizeExt, OpAccess, Register, RegisterExt

from emufuzz.arch.descriptors import DESC_CODE, DESC_EXPAND_DOWN, DESC_READABLE, DESC_WRITABLE
from emufuzz.arch.linear import is_canonical, linear_bits
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_SREG_CS, VCPU_SREG_DS, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_DF
from emufuzz.case.model import Case, Segment

_SEGMENTS: Final = (Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS)
_SEGMENT_NUMBER: Final = {register: number for number, register in enumerate(_SEGMENTS)}
_PREFIXES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_READS: Final = frozenset((OpAccess.READ, OpAccess.COND_READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_WRITES: Final = frozenset(
    (OpAccess.WRITE, OpAccess.COND_WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE)
)
_STACK_BASES: Final = frozenset(
    (Register.SP, Register.ESP, Register.RSP, Register.BP, Register.EBP, Register.RBP)
)
_ADDRESS_BITS: Final = {
    iced_x86.CodeSize.CODE16: 16,
    iced_x86.CodeSize.CODE32: 32,
    iced_x86.CodeSize.CODE64: 64,
}
_BIT_STRINGS: Final = frozenset(
    (iced_x86.Mnemonic.BT, iced_x86.Mnemonic.BTS, iced_x86.Mnemonic.BTR, iced_x86.Mnemonic.BTC)
)
_MAX_INSTRUCTION: Final = 15
_MASK64: Final = (1 << 64) - 1
_REP_ROUND: Final = 1024
_FACTORY: Final = InstructionInfoFactory()


@dataclass(frozen=True, slots=True)
class Access:
    """One memory access, before it is tried.

    Attributes:
        segment: VCPU_SREG_* number.
        offset: Effective address, truncated to the address size.
        linear: Linear address of the first byte.
        size: Bytes.
        read: Whether it reads.
        write: Whether it writes.
    """

    segment: int
    offset: int
    linear: int
    size: int
    read: bool
    write: bool


class CaseInstruction:
    """A case with its instruction taken apart; everything is computed when first asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.long = case.mode == "prot64"

    @cached_property
    def prefixes(self) -> bytes:
        """Legacy and REX prefixes, in order."""
        code = self.case.code
        for place, byte in enumerate(code):
            if byte not in _PREFIXES and not (self.long and byte & 0xF0 == 0x40):
                return code[:place]
        return code

    @cached_property
    def opcode(self) -> bytes:
        """What follows the prefixes: opcode bytes, ModRM and so on; at least 3 bytes, zeros if need be."""
        return self.case.code[len(self.prefixes) :].ljust(3, b"\0")

    def decode(self, *, lax: bool = False) -> Any:
        """The iced Instruction; `lax` accepts what the SDM forbids, as LOCK MOV."""
        cs = self.case.system.seg[VCPU_SREG_CS]
        bits = 64 if self.long else 32 if cs.db else 16
        options = iced_x86.DecoderOptions.NO_INVALID_CHECK if lax else iced_x86.DecoderOptions.NONE
        code = self.case.code[:_MAX_INSTRUCTION].ljust(_MAX_INSTRUCTION, b"\0")
        return Decoder(bits, code, options, ip=self.case.rip).decode()

    @cached_property
    def strict(self) -> Any:
        """The instruction, invalid if the SDM says #UD."""
        return self.decode()

    @cached_property
    def mnemonic(self) -> int:
        """The Mnemonic of iced, from the lax decoding."""
        return int(self._lax.mnemonic)

    @cached_property
    def _lax(self) -> Any:
        return self.decode(lax=True)

    @property
    def operand_bits(self) -> int:
        """Operand size by mode and prefixes: 16, 32 or 64."""
        if self.long and self.prefixes[-1:] and self.prefixes[-1] & 0xF8 == 0x48:
            return 64
        wide = self.long or bool(self.case.system.seg[VCPU_SREG_CS].db)
        return 32 if wide != (0x66 in self.prefixes) else 16

    def _register(self, register: Any) -> int:
        """Value of a register as an address component; RIP-relative bases are resolved by iced."""
        if register in {Register.NONE, Register.RIP, Register.EIP}:
            return 0
        return self.case.gpr[RegisterExt.number(register)] & (1 << RegisterExt.size(register) * 8) - 1

    def base(self, segment: int) -> int:
        """Segment base as linear addresses count it."""
        if self.long and segment <= VCPU_SREG_DS:
            return 0
        return self.case.system.seg[segment].base

    @cached_property
    def accesses(self) -> tuple[Access, ...]:
        """Every data access, REP string instructions with all bytes up to KVM's stopping point."""
        if not self._lax.code:
            return ()
        return tuple(self._access(used) for used in _FACTORY.info(self._lax).used_memory())

    def _access(self, used: Any) -> Access:
        bits = self._address_bits(used)
        offset = self._base(used) + self._register(used.index) * used.scale + self._displacement(used)
        offset = offset + self._bit_string_offset() & (1 << bits) - 1
        size = MemorySizeExt.size(used.memory_size)
        if self.string_opcode:
            size = self.operand_bits // 8 if self.opcode[0] & 1 else 1
        if self._repeats:
            offset, size = self._span(offset, size)
        segment = _SEGMENT_NUMBER.get(used.segment, VCPU_SREG_SS)
        linear = self.base(segment) + offset & ((1 << 64) - 1 if self.long else 0xFFFFFFFF)
        return Access(segment, offset, linear, size, used.access in _READS, used.access in _WRITES)

    def _base(self, used: Any) -> int:
        """The base register; of the stack pointer as many bits as SS says, whatever iced calls it."""
        if self._is_stack(used):
            return self.case.gpr[RegisterExt.number(used.base)]
        return self._register(used.base)

    def _displacement(self, used: Any) -> int:
        """As iced has it; how far a push goes below the stack pointer, which iced cuts to its own width."""
        value = int(used.displacement)
        if not self._is_stack(used):
            return value
        bits = RegisterExt.size(used.base) * 8
        return value - (1 << bits) if value >> bits - 1 & 1 else value

    def _address_bits(self, used: Any) -> int:
        """Width of an effective address; that of the stack is up to SS, which iced does not know."""
        if self._is_stack(used):
            return 64 if self.long else 32 if self.case.system.seg[VCPU_SREG_SS].db else 16
        return _ADDRESS_BITS[used.address_size]

    def _is_stack(self, used: Any) -> bool:
        """An access that an instruction makes to the stack by itself."""
        return bool(
            self._lax.is_stack_instruction and used.base in _STACK_BASES and not self._is_explicit(used)
        )

    def _is_explicit(self, used: Any) -> bool:
        """The access is the ModRM operand of an instruction that also uses the stack, as CALL [EBP]."""
        lax = self._lax
        kinds = (lax.op_kind(i) for i in range(lax.op_count))
        return iced_x86.OpKind.MEMORY in kinds and (used.base, used.index, used.displacement) == (
            lax.memory_base,
            lax.memory_index,
            lax.memory_displacement,
        )

    def _bit_string_offset(self) -> int:
        """How far BT, BTS, BTR or BTC reaches from its memory operand (SDM Vol. 2A BT)."""
        instruction = self._lax
        if instruction.mnemonic not in _BIT_STRINGS or instruction.op1_kind != iced_x86.OpKind.REGISTER:
            return 0
        bits = RegisterExt.size(instruction.op1_register) * 8
        value = self._register(instruction.op1_register)
        if value >> bits - 1:
            value -= 1 << bits
        return value // bits * (bits // 8)

    @cached_property
    def string_opcode(self) -> bool:
        """MOVS, CMPS, STOS, LODS, SCAS, INS or OUTS."""
        return bool(self._lax.is_string_instruction) and self.opcode[:1] != b"\x0f"

    @property
    def _repeats(self) -> bool:
        return self.string_opcode and (0xF2 in self.prefixes or 0xF3 in self.prefixes)

    def _span(self, offset: int, size: int) -> tuple[int, int]:
        """First offset and length of what the iterations touch."""
        count = self.case.gpr[VCPU_REGS_RCX] % _REP_ROUND or _REP_ROUND
        if self.case.rflags & X86_EFLAGS_DF:
            return offset - (count - 1) * size, count * size
        return offset, count * size

    def canonical(self, address: int) -> bool:
        """Whether a linear address, taken modulo 2^64, is canonical (SDM Vol. 1 3.3.7.1)."""
        return is_canonical(address & _MASK64, linear_bits(self.case.system.cr4))

    def refused(self, access: Access) -> bool:
        """Whether segmentation, or in 64-bit mode a non-canonical address, forbids the access."""
        if not self.long:
            return self.violates_segment(access)
        return not all(self.canonical(access.linear + edge) for edge in (0, max(access.size, 1) - 1))

    def violates_segment(self, access: Access) -> bool:
        """Whether limit, type or presence of the segment forbids the access (SDM Vol. 3A 5.3 to 5.5)."""
        if self.long:
            return False
        seg = self.case.system.seg[access.segment]
        if not seg.p:
            return True
        if access.write and (seg.type & DESC_CODE or not seg.type & DESC_WRITABLE):
            return True
        if access.read and seg.type & DESC_CODE and not seg.type & DESC_READABLE:
            return True
        return outside_limit(seg, access.offset, access.size)


def outside_limit(seg: Segment, offset: int, size: int) -> bool:
    """Whether any of `size` bytes from `offset` is outside of a segment."""
    last = offset + max(size, 1) - 1
    if not seg.type & DESC_CODE and seg.type & DESC_EXPAND_DOWN:
        return offset <= seg.limit or last > (0xFFFFFFFF if seg.db else 0xFFFF)
    return offset < 0 or last > seg.limit
