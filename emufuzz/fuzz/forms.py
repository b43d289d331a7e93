"""Every leaf of the opcode tables as something that can be encoded: a `Form`.

The tables of emufuzz.emulator.tables say how bytes select a leaf; here the same tree is walked
the other way round, from a leaf to the bytes that select it: opcode, fixed ModRM fields, the
mandatory prefix, the modes in which it can be reached.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

from emufuzz.arch.leaves import family_of
from emufuzz.emulator.flags import (
    OP_IMM,
    OP_IMM64,
    OP_IMMBYTE,
    OP_IMMFADDR,
    OP_IMMU16,
    OP_IMMUBYTE,
    ByteOp,
    MemAbs,
    NearBranch,
    No16,
    NotImpl,
    Op3264,
    Stack,
    Undefined,
)
from emufuzz.emulator.opcode import (
    KIND_DUAL,
    KIND_ESCAPE,
    KIND_GROUP,
    KIND_LEAF,
    KIND_MODE,
    KIND_PREFIX,
    KIND_RMEXT,
    KIND_VEX,
    Opcode,
)
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE

MOD_ANY: Final = 0
MOD_MEMORY: Final = 1
MOD_REGISTER: Final = 2

#: One-byte opcodes that the decoder consumes as prefixes, so that no instruction starts there.
PREFIX_BYTES: Final = frozenset((0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
ESCAPE_BYTES: Final = frozenset((0x0F,))
REX_BYTES: Final = range(0x40, 0x50)

PREFIX_CLASSES: Final = ("no", "66", "f2", "f3")


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A leaf and what its encodings have in common.

    `reg`, `rm` are fixed ModRM fields (-1 = free), `mod` a MOD_* constraint, `prefix` the
    mandatory prefix's class ("" = any), `mode64` True/False if only (not) 64-bit mode reaches
    the leaf. `implemented` says that the tables name a handler.
    """

    leaf: str
    mnemonic: str
    family: str
    opcode: bytes
    d: int
    dst: int
    src: int
    src2: int
    implemented: bool
    has_modrm: bool
    mod: int = MOD_ANY
    reg: int = -1
    rm: int = -1
    prefix: str = ""
    mode64: bool | None = None

    def immediate_bytes(self, op_bytes: int, ad_bytes: int) -> int:
        """Bytes of immediate operands behind the ModRM part, for effective sizes (decode_operand)."""
        if self.d & MemAbs:
            return ad_bytes
        full = 1 if self.d & ByteOp else op_bytes
        total = 0
        for kind in (self.src, self.src2, self.dst):
            if kind in (OP_IMMBYTE, OP_IMMUBYTE):
                total += 1
            elif kind == OP_IMM:
                total += min(full, 4)
            elif kind == OP_IMM64:
                total += full
            elif kind == OP_IMMU16:
                total += 2
            elif kind == OP_IMMFADDR:
                total += op_bytes + 2
        return total

    def operand_bytes(self, op_bytes: int, bits: int) -> int:
        """The operand size after the fix-ups that the opcode's flags make in `bits`-bit code."""
        if bits == 64:
            if self.d & Stack and op_bytes == 4:
                return 8
            if self.d & NearBranch:
                return 8
        if self.d & Op3264:
            return 8 if bits == 64 else 4
        if self.d & No16 and op_bytes == 2:
            return 4
        return op_bytes


@dataclass(frozen=True, slots=True)
class _Path:
    """What the walk from a map's slot to a leaf has fixed so far."""

    mod: int = MOD_ANY
    reg: int = -1
    rm: int = -1
    prefix: str = ""
    mode64: bool | None = None


@cache
def forms() -> tuple[Form, ...]:
    """All leaves that an instruction can reach, in opcode order, once per way to reach them."""
    return tuple(_all_forms())


def _all_forms() -> Iterator[Form]:
    for table, lead in ((ONE_BYTE, b""), (TWO_BYTE, b"\x0f"), (THREE_BYTE, b"\x0f\x38")):
        for byte, slot in enumerate(table):
            opcode = lead + bytes((byte,))
            if not lead and (byte in PREFIX_BYTES or byte in ESCAPE_BYTES):
                continue
            if lead == b"\x0f" and byte == 0x38:
                continue
            rex = not lead and byte in REX_BYTES
            yield from _walk(slot, opcode, _Path(mode64=False if rex else None))


def _walk(slot: Opcode, opcode: bytes, path: _Path) -> Iterator[Form]:
    if slot.kind == KIND_LEAF:
        yield _form(slot, opcode, path)
        return
    for i, child in enumerate(slot.children):
        for step in _steps(slot.kind, i, path):
            yield from _walk(child, opcode, step)


def _steps(kind: int, i: int, path: _Path) -> tuple[_Path, ...]:
    """The path(s) into child `i` of a node of this kind."""
    if kind == KIND_GROUP:
        return (replace(path, reg=i),)
    if kind == KIND_DUAL:
        return (replace(path, mod=MOD_REGISTER if i else MOD_MEMORY),)
    if kind == KIND_RMEXT:
        return (replace(path, rm=i),)
    if kind == KIND_PREFIX:
        return (replace(path, prefix=PREFIX_CLASSES[i]),)
    if kind == KIND_ESCAPE:
        if i < 8:
            return (replace(path, mod=MOD_MEMORY, reg=i),)
        return (replace(path, mod=MOD_REGISTER, reg=(i - 8) >> 3, rm=(i - 8) & 7),)
    if kind == KIND_MODE:
        return (replace(path, mode64=bool(i)),)
    if kind == KIND_VEX:
        if not i:
            return (replace(path, mode64=False, mod=MOD_MEMORY),)
        return (replace(path, mode64=True), replace(path, mode64=False, mod=MOD_REGISTER))
    raise ValueError(f"unknown kind of opcode table node: {kind}")


def _form(slot: Opcode, opcode: bytes, path: _Path) -> Form:
    implemented = slot.execute is not None and not slot.d & (NotImpl | Undefined)
    return Form(
        slot.leaf,
        slot.mnemonic,
        family_of(slot.leaf),
        opcode,
        slot.d,
        slot.dst,
        slot.src,
        slot.src2,
        implemented,
        slot.has_modrm,
        path.mod,
        path.reg,
        path.rm,
        path.prefix,
        path.mode64,
    )
