"""The three-byte opcode map, 0F 38 xx (emulate.c: opcode_map_0f_38; SDM Vol. 2D Table A-4).

Opcodes without a row are not implemented.
"""

from __future__ import annotations

from typing import Final

from emufuzz.emulator.opcode import Entry
from emufuzz.emulator.tables.groups import movbe
from emufuzz.emulator.tables.words import Mem, Reg

# fmt: off
#    op    how    mnemonic, handler, dst, src, src2, flags[, permission hook[, intercept]]
THREE_BYTE_ROWS: Final[tuple[tuple[int, Entry], ...]] = (
    # f0 - ff
    (0xf0, movbe(Reg, Mem)),
    (0xf1, movbe(Mem, Reg)),
)
# fmt: on
