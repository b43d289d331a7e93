"""The three opcode maps, resolved: 256 `Opcode` slots each."""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.opcode import Opcode, build
from emufuzz.emulator.operands import OPERAND_DECODERS
from emufuzz.emulator.tables.one_byte import ONE_BYTE_ROWS
from emufuzz.emulator.tables.three_byte import THREE_BYTE_ROWS
from emufuzz.emulator.tables.two_byte import TWO_BYTE_ROWS

ONE_BYTE: Final[tuple[Opcode, ...]] = build(ONE_BYTE_ROWS, "", OPERAND_DECODERS)
TWO_BYTE: Final[tuple[Opcode, ...]] = build(TWO_BYTE_ROWS, "0f", OPERAND_DECODERS)
THREE_BYTE: Final[tuple[Opcode, ...]] = build(THREE_BYTE_ROWS, "0f38", OPERAND_DECODERS)
