"""What the bytes of an instruction say whatever the registers hold, decoded by iced and kept.

The generator gives many register states to one instruction, so this is paid for once per encoding.
Everything that depends on the state is in `view`.
"""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any, Final, NamedTuple

import iced_x86
from iced_x86 import (
    Decoder,
    DecoderError,
    DecoderOptions,
    MemorySizeExt,
    OpAccess,
    OpKind,
    Register,
    RegisterExt,
)

from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_SS

MAX_INSTRUCTION: Final = 15
_SEGMENT_NUMBER: Final = {
    register: number
    for number, register in enumerate(
        (Register.ES, Register.CS, Register.SS, Register.DS, Register.FS, Register.GS)
    )
}
_LEGACY: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_NULL_OVERRIDES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E))
_CERTAIN_READS: Final = frozenset((OpAccess.READ, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_CERTAIN_WRITES: Final = frozenset((OpAccess.WRITE, OpAccess.READ_WRITE, OpAccess.READ_COND_WRITE))
_WRITES: Final = _CERTAIN_WRITES | {OpAccess.COND_WRITE}
_READS: Final = _CERTAIN_READS | {OpAccess.COND_READ}
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
_CARRY_ROTATES: Final = frozenset((iced_x86.Mnemonic.RCL, iced_x86.Mnemonic.RCR))
#: iced's RflagsBits -> RFLAGS bit, lowest first.
_RFLAGS: Final = (0x800, 0x80, 0x40, 0x10, 0x1, 0x4, 0x400, 0x200, 0x40000)
#: iced's numbers of AL to R15; registers are ints to iced, but not to its type information.
_BY_WIDTH: Final[Any] = range(Register.AL, Register.R15 + 1)
#: General-purpose register of any width -> number of the 64-bit one, and its bit.
_GPR_NUMBER: Final = {
    register: RegisterExt.number(RegisterExt.full_register(register))
    for register in _BY_WIDTH
    if RegisterExt.is_gpr(register)
}
_GPR_BIT: Final = {register: 1 << number for register, number in _GPR_NUMBER.items()}
_FACTORY: Final = iced_x86.InstructionInfoFactory()
_GPR_MASK: Final = {1: 0xFF, 2: 0xFFFF, 4: 0xFFFFFFFF, 8: (1 << 64) - 1}


class Part(NamedTuple):
    """A register as part of an address: its GPR number, the mask of its width, its scale."""

    number: int
    mask: int
    scale: int


class Reference(NamedTuple):
    """One memory access as the encoding has it.

    `bits` is the width of the effective address, 0 if the stack segment decides. `certain` accesses
    happen whenever the instruction completes; the others, as those of CMOV-like forms, may.
    """

    segment: int
    parts: tuple[Part, ...]
    displacement: int
    relative: bool
    bits: int
    size: int
    read: bool
    write: bool
    certain: bool
    explicit: bool


@cache
def _rflags(modified: int) -> int:
    """RFLAGS bits of iced's set."""
    return sum(bit for place, bit in enumerate(_RFLAGS) if modified >> place & 1)


def _exceeds(code: bytes, bits: int) -> bool:
    """Whether the bytes, of which 15 are given, would be an instruction if that could be longer."""
    count = 0
    while count < len(code) and (code[count] in _LEGACY or (bits == 64 and code[count] & 0xF0 == 0x40)):
        count += 1
    rex = code[count - 1 : count] if bits == 64 and count and code[count - 1] & 0xF0 == 0x40 else b""
    needed = bytes(dict.fromkeys(byte for byte in code[:count] if byte in _LEGACY)) + rex
    rest = (needed + code[count:]).ljust(MAX_INSTRUCTION, b"\0")[:MAX_INSTRUCTION]
    instruction = Decoder(bits, rest, DecoderOptions.NO_INVALID_CHECK).decode()
    return bool(instruction.code) and count - len(needed) + instruction.len > MAX_INSTRUCTION


class Destination(NamedTuple):
    """A general-purpose register that is a written operand; `high` for AH to BH."""

    number: int
    size: int
    high: bool
    certain: bool


#: POP Sreg.
_POP_SEGMENT: Final = frozenset((0x07, 0x17, 0x1F))
_POP_SEGMENT_0F: Final = frozenset((b"\x0f\xa1", b"\x0f\xa9"))
#: Opcodes behind which ModRM decides what the instruction is, one byte and 0F xx.
_GROUPS: Final = frozenset((0x8C, 0x8E, 0x8F, 0xC6, 0xC7, 0xF6, 0xF7, 0xFE, 0xFF))
_GROUPS_0F: Final = frozenset((0x00, 0x01, 0x20, 0x21, 0x22, 0x23, 0xAE, 0xBA, 0xC7))
#: All of an encoding that conditions of rules look at; what only places and values decide is left out.
Shape = tuple[int, ...]


class Decoded:
    """An encoding taken apart.

    Attributes:
        bits: 16, 32 or 64: how CS makes the processor decode.
        lax: The iced Instruction, with what the SDM forbids accepted; `known` tells if there is any.
        valid: The SDM has no #UD for the encoding as such.
        truncated: The bytes given do not hold all of the instruction.
        too_long: 15 bytes do not.
        mnemonic: iced's Mnemonic.
        opcode: Bytes behind the prefixes, padded to 3.
        lock, rep, rex: The prefixes that count; rep is 0xF2, 0xF3 or 0.
    """

    def __init__(self, code: bytes, bits: int) -> None:
        """Take the bytes apart; `code` has at most 15."""
        self.code = code
        self.bits = bits
        self.long = bits == 64
        self.lax: Any = Decoder(bits, code, DecoderOptions.NONE).decode()
        self.valid = bool(self.lax.code)
        short = False
        if not self.valid:
            decoder = Decoder(bits, code, DecoderOptions.NO_INVALID_CHECK)
            self.lax = decoder.decode()
            short = not self.lax.code and decoder.last_error == DecoderError.NO_MORE_BYTES
        full = len(code) == MAX_INSTRUCTION
        self.too_long = full and not self.lax.code and (short or _exceeds(code, bits))
        self.truncated = short and not full
        self.known = bool(self.lax.code)
        self.mnemonic = int(self.lax.mnemonic)
        self.length = int(self.lax.len)
        self._read_prefixes(code)
        self._read_operands()
        self.shape = self._shape()

    def _read_prefixes(self, code: bytes) -> None:
        count = rep = rex = 0
        for byte in code:
            if byte in _LEGACY:
                rex = 0
                rep = byte if byte in {0xF2, 0xF3} else rep
            elif self.long and byte & 0xF0 == 0x40:
                rex = byte
            else:
                break
            count += 1
        self.prefixes = code[:count]
        self.opcode = code[count:].ljust(3, b"\0")
        self.lock = 0xF0 in self.prefixes
        self.rep, self.rex = rep, rex
        self.null_override = self.long and not _NULL_OVERRIDES.isdisjoint(self.prefixes)
        modrm = self.opcode[2 if self.opcode[0] == 0x0F else 1]
        self.mod, self.reg, self.rm = modrm >> 6, modrm >> 3 & 7, modrm & 7
        short = self.bits == 16
        self.operand_bits = 64 if rex & 8 else 32 if short == (0x66 in self.prefixes) else 16

    def _read_operands(self) -> None:
        lax = self.lax
        self.string = bool(lax.is_string_instruction) and self.opcode[0] != 0x0F
        self.repeats = self.string and self.rep != 0
        self.references: tuple[Reference, ...] = ()
        self.destinations: tuple[Destination, ...] = ()
        self.written = self.flags = 0
        self.size_unknown = False
        if not self.known:
            return
        info = _FACTORY.info(lax)
        self.references = tuple(self._reference(used) for used in info.used_memory())
        self.destinations = tuple(self._destinations(info))
        for used in info.used_registers():
            if used.access in _WRITES:
                self.written |= _GPR_BIT.get(used.register, 0)
        self.flags = _rflags(lax.rflags_modified)
        if self.mnemonic in _CARRY_ROTATES:  # OF is undefined, also where iced sees no rotation
            self.flags |= _RFLAGS[0]
        self.size_unknown = any(reference.size == 0 for reference in self.references)

    def _destinations(self, info: Any) -> Any:
        lax = self.lax
        for place in range(lax.op_count):
            access = info.op_access(place)
            if access in _WRITES and lax.op_kind(place) == OpKind.REGISTER:
                register = lax.op_register(place)
                if register in _GPR_NUMBER:
                    high = Register.AH <= register <= Register.BH
                    size = RegisterExt.size(register)
                    yield Destination(_GPR_NUMBER[register], size, high, access in _CERTAIN_WRITES)

    def _reference(self, used: Any) -> Reference:
        lax = self.lax
        explicit = self._is_explicit(used)
        stack = not explicit and lax.is_stack_instruction and used.base in _STACK_BASES
        size = MemorySizeExt.size(used.memory_size)
        if self.string:
            size = self.operand_bits // 8 if self.opcode[0] & 1 else 1
            size = min(size, 4) if self.opcode[0] < 0x70 else size  # ports have 4 bytes at most
        if stack and (self.opcode[0] in _POP_SEGMENT or self.opcode[:2] in _POP_SEGMENT_0F):
            size = 2  # all of a selector: processors need not read the rest of what they pop
        return Reference(
            segment=_SEGMENT_NUMBER.get(used.segment, VCPU_SREG_SS),
            parts=tuple(self._parts(used, stack=stack)),
            displacement=self._stack_displacement(used) if stack else used.displacement,
            relative=explicit and bool(lax.is_ip_rel_memory_operand),
            bits=0 if stack else _ADDRESS_BITS.get(used.address_size, self.bits),
            size=size,
            read=used.access in _READS,
            write=used.access in _WRITES,
            certain=(used.access in _CERTAIN_READS | _CERTAIN_WRITES or self.repeats)
            and not (self._far_call and not explicit),  # the target is checked before the stack
            explicit=explicit,
        )

    def _stack_displacement(self, used: Any) -> int:
        """A displacement that iced has cut to the width of the code, which need not be the stack's."""
        bits = RegisterExt.size(used.base) * 8
        value = int(used.displacement) & (1 << bits) - 1
        return value - (value >> bits - 1 << bits)

    def _parts(self, used: Any, *, stack: bool) -> Any:
        for register, scale in ((used.base, 1), (used.index, used.scale)):
            if register in _GPR_NUMBER:
                size = 8 if stack else RegisterExt.size(register)  # SS decides how much of RSP counts
                yield Part(_GPR_NUMBER[register], _GPR_MASK[size], scale)

    def _is_explicit(self, used: Any) -> bool:
        """The access is the ModRM operand of an instruction that also uses the stack, as CALL [EBP]."""
        lax = self.lax
        if all(lax.op_kind(place) != OpKind.MEMORY for place in range(lax.op_count)):
            return False
        base = Register.NONE if lax.is_ip_rel_memory_operand else lax.memory_base
        return (used.base, used.index, used.displacement) == (base, lax.memory_index, lax.memory_displacement)

    def _shape(self) -> Shape:
        """Encodings of one shape have the same rules."""
        opcode, lax = self.opcode, self.lax
        wide = opcode[0] == 0x0F
        grouped = (opcode[1] in _GROUPS_0F) if wide else opcode[0] in _GROUPS
        near66 = self.long and 0x66 in self.prefixes and lax.flow_control != iced_x86.FlowControl.NEXT
        return (
            self.bits | self.valid << 8 | self.known << 9 | self.too_long << 10 | self.truncated << 11,
            int(lax.code),
            opcode[0] | opcode[1] << 8 if wide else opcode[0],
            self.reg | self.mod << 3 | self.rm << 6 | (self.rex & 4) << 8 if grouped else 0,
            self.lock
            | (self.mod == 3) << 1
            | self.repeats << 2
            | near66 << 3
            | (self.operand_bits == 16) << 4,
            bool(self.written & 0x10),
            self.mnemonic == iced_x86.Mnemonic.AAM and int(lax.immediate8),
            *(each.size | (each.number == VCPU_REGS_RSP) << 4 for each in self.destinations),
        )

    @property
    def _far_call(self) -> bool:
        return self.opcode[0] == 0x9A or (self.opcode[0] == 0xFF and self.reg == 3)

    @property
    def bit_string(self) -> bool:
        """BT and its kin with a register operand, which reaches beyond the addressed operand."""
        return self.mnemonic in _BIT_STRINGS and self.lax.op1_kind == OpKind.REGISTER


@lru_cache(maxsize=1024)
def decoded(code: bytes, bits: int) -> Decoded:
    """The Decoded of at most 15 bytes; the same object for the same bytes."""
    return Decoded(code, bits)
