"""Opcode flag words and operand kinds, in KVM's vocabulary (emulate.c, top of the file).

Plain ints: a test with `&` on them costs a small fraction of one on `IntFlag`. KVM packs the
operand kinds into the same 64-bit word; here they are fields of their own in an opcode.
"""

from __future__ import annotations

from typing import Final, TypeAlias

OpFlags: TypeAlias = int

ByteOp: Final = 1 << 0  # 8-bit operands
ModRM: Final = 1 << 1  # a ModRM byte follows
Mov: Final = 1 << 2  # the destination is written without being read
BitOp: Final = 1 << 3  # the source is a bit offset into the destination
MemAbs: Final = 1 << 4  # the memory operand is a bare displacement (moffs)
String: Final = 1 << 5  # string instruction: REP applies
Stack: Final = 1 << 6  # implicit stack access: 64-bit operand size in 64-bit mode
Prefix: Final = 1 << 7  # selected by 66/F2/F3
Sse: Final = 1 << 8  # XMM registers
Mmx: Final = 1 << 9  # MMX registers
Unaligned: Final = 1 << 10  # 16-byte operand without alignment check
Aligned: Final = 1 << 11  # operand must be aligned to its size
Aligned16: Final = 1 << 12  # operand must be aligned to 16 bytes whatever its size
Lock: Final = 1 << 13  # LOCK is legal (with a memory destination)
Undefined: Final = 1 << 14  # raises #UD
NotImpl: Final = 1 << 15  # the emulator does not know it
Priv: Final = 1 << 16  # CPL 0 only
PrivUD: Final = 1 << 17  # #UD instead of #GP above CPL 0
Prot: Final = 1 << 18  # #UD in real and virtual-8086 mode
No64: Final = 1 << 19  # #UD in 64-bit mode
No16: Final = 1 << 20  # no 16-bit operand size
NoMod: Final = 1 << 21  # ModRM.mod is ignored: always a register
NoAccess: Final = 1 << 22  # the memory operand's address is used, not its contents
NoWrite: Final = 1 << 23  # the destination is not written back
SrcWrite: Final = 1 << 24  # the source is written back too
Op3264: Final = 1 << 25  # 64-bit operands in 64-bit mode, else 32-bit
NearBranch: Final = 1 << 26  # 64-bit operand size in 64-bit mode
IsBranch: Final = 1 << 27  # counts as a retired branch
Intercept: Final = 1 << 28  # nested hypervisors may intercept it
CheckPerm: Final = 1 << 29  # has a permission hook
EmulateOnUD: Final = 1 << 30  # emulated when the guest took #UD on it
PageTable: Final = 1 << 31  # commonly used to write page tables
TwoMemOp: Final = 1 << 32  # two memory operands: no single fault address
IncSP: Final = 1 << 33  # RSP is incremented before an RSP-based address is formed
Fastop: Final = 1 << 34  # flags come straight from the host's ALU

FLAG_WORDS: Final[dict[str, OpFlags]] = {
    name: value
    for name, value in list(globals().items())
    if isinstance(value, int) and not name.startswith("_")
}

AlignMask: Final = Unaligned | Aligned | Aligned16

OP_NONE: Final = 0
OP_REG: Final = 1
OP_MEM: Final = 2
OP_ACC: Final = 3
OP_DI: Final = 4
OP_MEM64: Final = 5
OP_IMMUBYTE: Final = 6
OP_DX: Final = 7
OP_CL: Final = 8
OP_IMMBYTE: Final = 9
OP_ONE: Final = 10
OP_IMM: Final = 11
OP_MEM16: Final = 12
OP_MEM32: Final = 13
OP_SI: Final = 14
OP_IMMFADDR: Final = 15
OP_MEMFADDR: Final = 16
OP_IMMU16: Final = 17
OP_ES: Final = 18
OP_CS: Final = 19
OP_SS: Final = 20
OP_DS: Final = 21
OP_FS: Final = 22
OP_GS: Final = 23
OP_MEM8: Final = 24
OP_IMM64: Final = 25
OP_XLAT: Final = 26
OP_ACCLO: Final = 27
OP_ACCHI: Final = 28
OP_IMPLICIT: Final = 29

#: Operand kind -> name, as in KVM's OP_* constants without the prefix.
OPERAND_KINDS: Final = (
    "None", "Reg", "Mem", "Acc", "DI", "Mem64", "ImmUByte", "DX", "CL", "ImmByte",
    "One", "Imm", "Mem16", "Mem32", "SI", "ImmFAddr", "MemFAddr", "ImmU16", "ES", "CS",
    "SS", "DS", "FS", "GS", "Mem8", "Imm64", "XLat", "AccLo", "AccHi", "Implicit",
)  # fmt: skip


def describe(flags: OpFlags) -> str:
    """The flag words set in `flags`, lowest bit first, joined by `|`."""
    return "|".join(name for name, bit in FLAG_WORDS.items() if flags & bit)
