"""Operand kinds as the table rows spell them; `___` is no operand."""

from __future__ import annotations

from typing import Final

from emufuzz.emulator import flags as f

___: Final = f.OP_NONE
Reg: Final = f.OP_REG
Mem: Final = f.OP_MEM
Acc: Final = f.OP_ACC
DI: Final = f.OP_DI
Mem64: Final = f.OP_MEM64
ImmUByte: Final = f.OP_IMMUBYTE
DX: Final = f.OP_DX
CL: Final = f.OP_CL
ImmByte: Final = f.OP_IMMBYTE
One: Final = f.OP_ONE
Imm: Final = f.OP_IMM
Mem16: Final = f.OP_MEM16
Mem32: Final = f.OP_MEM32
SI: Final = f.OP_SI
ImmFAddr: Final = f.OP_IMMFADDR
MemFAddr: Final = f.OP_MEMFADDR
ImmU16: Final = f.OP_IMMU16
ES: Final = f.OP_ES
CS: Final = f.OP_CS
SS: Final = f.OP_SS
DS: Final = f.OP_DS
FS: Final = f.OP_FS
GS: Final = f.OP_GS
Mem8: Final = f.OP_MEM8
Imm64: Final = f.OP_IMM64
XLat: Final = f.OP_XLAT
AccLo: Final = f.OP_ACCLO
AccHi: Final = f.OP_ACCHI
Implicit: Final = f.OP_IMPLICIT
