"""A few instructions by name, assembled by iced: all that the machine code of the runner needs."""

from __future__ import annotations

from typing import Any, Final, TypeAlias

from iced_x86 import BlockEncoder, Code, Instruction, MemoryOperand, Register

#: A constant of iced's Register, and one of its Code; its stubs make types of neither.
Reg: TypeAlias = Any
Opcode: TypeAlias = Any

_FIRST_LABEL: Final = 1 << 40  # above every address that an instruction names


class Assembler:
    """Collects instructions; `bytes()` resolves the labels. All registers are 64 bits wide."""

    def __init__(self) -> None:
        self._instructions: list[Any] = []
        self._labels: dict[str, int] = {}
        self._pending = 0

    def _label(self, name: str) -> int:
        return self._labels.setdefault(name, _FIRST_LABEL + len(self._labels))

    def label(self, name: str) -> None:
        """The next instruction is where `name` points to."""
        self._pending = self._label(name)

    def emit(self, instruction: Any) -> None:
        """Append an iced Instruction."""
        if self._pending:
            instruction.ip, self._pending = self._pending, 0
        self._instructions.append(instruction)

    def op(self, code: Opcode, *registers: Reg) -> None:
        """An instruction whose operands, at most two, are registers."""
        if not registers:
            self.emit(Instruction.create(code))
        elif len(registers) == 1:
            self.emit(Instruction.create_reg(code, registers[0]))
        else:
            self.emit(Instruction.create_reg_reg(code, registers[0], registers[1]))

    def load(self, register: Reg, memory: Any, code: Opcode = Code.MOV_R64_RM64) -> None:
        """Register := memory."""
        self.emit(Instruction.create_reg_mem(code, register, memory))

    def store(self, memory: Any, register: Reg, code: Opcode = Code.MOV_RM64_R64) -> None:
        """Memory := register."""
        self.emit(Instruction.create_mem_reg(code, memory, register))

    def move(self, to: Reg, source: Reg) -> None:
        """Register := register."""
        self.op(Code.MOV_R64_RM64, to, source)

    def constant(self, register: Reg, value: int) -> None:
        """Register := a number below 2^31."""
        self.emit(Instruction.create_reg_i32(Code.MOV_RM64_IMM32, register, value))

    def immediate(self, code: Opcode, register: Reg, value: int) -> None:
        """An instruction on a register and a number below 2^31."""
        self.emit(Instruction.create_reg_i32(code, register, value))

    def zero(self, register: Reg) -> None:
        """Register := 0."""
        self.op(Code.XOR_R64_RM64, register, register)

    def lea(self, register: Reg, memory: Any) -> None:
        """Register := address."""
        self.load(register, memory, Code.LEA_R64_M)

    def address(self, register: Reg, label: str) -> None:
        """Register := where the label is, wherever the code was loaded."""
        self.lea(register, MemoryOperand(Register.RIP, displ=self._label(label), displ_size=8))

    def jump(self, code: Opcode, label: str) -> None:
        """A near branch, conditional or not."""
        self.emit(Instruction.create_branch(code, self._label(label)))

    def copy_quadwords(self, count: int) -> None:
        """REP MOVSQ of `count` quadwords from [RSI] to [RDI]."""
        self.constant(Register.RCX, count)
        self.emit(Instruction.create_rep_movsq(64))

    def bytes(self) -> bytes:
        """The machine code; it may be loaded at any address."""
        encoder = BlockEncoder(64)
        encoder.add_many(self._instructions)
        return bytes(encoder.encode(0))


def at(base: Reg, offset: int = 0, index: Reg = Register.NONE, scale: int = 1) -> Any:
    """The memory operand [base + index * scale + offset]."""
    return MemoryOperand(base, index, scale, offset, 1 if offset else 0)
