"""Opcode tables: rows as they are written, and the tree the decoder walks (struct opcode, group_dual ...).

A table is written as rows, groups and switches (`tables/`). Building it resolves everything that
decoding would otherwise look up per instruction: flags merged from the top of a chain of groups
down to the leaf, operand decoders, the leaf's id (`f7/6`, `0f2b.pfx_66.mem`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from emufuzz.emulator.ctxt import Operand, X86EmulateCtxt
from emufuzz.emulator.flags import OP_NONE, ModRM, NotImpl, OpFlags

#: An instruction handler (em_*, check_*): returns an X86EMUL_* result.
Handler: TypeAlias = Callable[[X86EmulateCtxt], int]
#: Fills one operand during decoding; returns an X86EMUL_* result.
OperandDecoder: TypeAlias = Callable[[X86EmulateCtxt, Operand], int]

KIND_LEAF: Final = 0
KIND_GROUP: Final = 1  # by ModRM.reg
KIND_DUAL: Final = 2  # memory or register form
KIND_RMEXT: Final = 3  # by ModRM.rm
KIND_PREFIX: Final = 4  # none, 66, F2, F3
KIND_ESCAPE: Final = 5  # x87: by ModRM.reg below C0, else by the whole byte
KIND_MODE: Final = 6  # outside or in 64-bit mode
KIND_VEX: Final = 7  # C4 and C5: a VEX prefix in 64-bit mode or with a register form


@dataclass(frozen=True, slots=True, eq=False)
class Opcode:
    """A slot of the tables, resolved. Only leaves (`kind` KIND_LEAF) have operands and handlers."""

    leaf: str
    mnemonic: str
    d: OpFlags
    has_modrm: bool
    kind: int = KIND_LEAF
    children: tuple[Opcode, ...] = ()
    dst: int = OP_NONE
    src: int = OP_NONE
    src2: int = OP_NONE
    execute: Handler | None = None
    in_switch: bool = False
    check_perm: Handler | None = None
    intercept: str = ""
    decode_dst: OperandDecoder | None = None
    decode_src: OperandDecoder | None = None
    decode_src2: OperandDecoder | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A leaf as written in a table."""

    mnemonic: str
    flags: OpFlags
    dst: int = OP_NONE
    src: int = OP_NONE
    src2: int = OP_NONE
    execute: Handler | None = None
    in_switch: bool = False
    check_perm: Handler | None = None
    intercept: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """An inner node as written: `kind` says what selects among `children`; `flags` go to all of them."""

    kind: int
    children: tuple[Row | Node, ...]
    flags: OpFlags = 0
    names: tuple[str, ...] = field(default=())


Entry: TypeAlias = Row | Node
N: Final = Row("", NotImpl)


def op(
    mnemonic: str,
    execute: Handler | None,
    dst: int,
    src: int,
    src2: int,
    flags: OpFlags,
    check_perm: Handler | None = None,
    intercept: str = "",
) -> Row:
    """A row whose handler KVM names in its table."""
    return Row(mnemonic, flags, dst, src, src2, execute, check_perm=check_perm, intercept=intercept)


def switch(
    mnemonic: str,
    execute: Handler,
    dst: int,
    src: int,
    src2: int,
    flags: OpFlags,
    check_perm: Handler | None = None,
    intercept: str = "",
) -> Row:
    """A row that KVM executes in the opcode switch at the end of x86_emulate_insn."""
    return Row(mnemonic, flags, dst, src, src2, execute, True, check_perm, intercept)


def group(flags: OpFlags, children: Sequence[Entry]) -> Node:
    """Select by ModRM.reg among eight."""
    names = tuple(f"/{i}" for i in range(8))
    return Node(KIND_GROUP, tuple(children), flags | ModRM, names)


def dual(mem: Entry, reg: Entry, flags: OpFlags = 0) -> Node:
    """Select by the form of ModRM: memory or register (C: InstrDual)."""
    return Node(KIND_DUAL, (mem, reg), flags | ModRM, (".mem", ".mod3"))


def group_dual(flags: OpFlags, mem: Sequence[Entry], reg: Sequence[Entry]) -> Node:
    """Select by ModRM.reg among eight memory or eight register forms (C: GroupDual)."""
    pairs = tuple(dual(m, r) for m, r in zip(mem, reg, strict=True))
    return group(flags, pairs)


def rm_ext(children: Sequence[Entry]) -> Node:
    """Select by ModRM.rm among eight."""
    return Node(KIND_RMEXT, tuple(children), ModRM, tuple(f".rm={i}" for i in range(8)))


def by_prefix(no: Entry, p66: Entry, f2: Entry, f3: Entry, flags: OpFlags = 0) -> Node:
    """Select by mandatory prefix."""
    return Node(KIND_PREFIX, (no, p66, f2, f3), flags, (".pfx_no", ".pfx_66", ".pfx_f2", ".pfx_f3"))


def escape(name: str, mem: Sequence[Entry], high: Sequence[Entry]) -> Node:
    """An x87 escape: eight memory forms, then 64 register encodings C0..FF."""
    names = tuple(f".escape_{name}/{i}.mem" for i in range(8)) + tuple(
        f".escape_{name}.modrm={m:02x}" for m in range(0xC0, 0x100)
    )
    return Node(KIND_ESCAPE, (*mem, *high), ModRM, names)


def by_mode(other: Entry, mode64: Entry, flags: OpFlags = 0) -> Node:
    """Select by 64-bit mode (C: ModeDual)."""
    return Node(KIND_MODE, (other, mode64), flags, (".mode!64", ".mode64"))


def vex(legacy: Entry) -> Node:
    """C4 or C5: the legacy far-pointer load, unless the bytes mean a VEX prefix."""
    return Node(KIND_VEX, (legacy, N), ModRM, (".mode!64.and.mem", ".mode64|mod3.(VEX)"))


def build(
    rows: Iterable[tuple[int, Entry]], prefix: str, decoders: dict[int, OperandDecoder]
) -> tuple[Opcode, ...]:
    """Resolve one opcode map; opcodes without a row are not implemented. `prefix` is "", "0f", "0f38"."""
    entries = dict(rows)
    return tuple(_resolve(entries.get(byte, N), f"{prefix}{byte:02x}", 0, decoders) for byte in range(256))


def _resolve(entry: Entry, leaf: str, flags: OpFlags, decoders: dict[int, OperandDecoder]) -> Opcode:
    d = entry.flags | flags
    if isinstance(entry, Node):
        children = tuple(
            _resolve(child, leaf + name, d, decoders)
            for child, name in zip(entry.children, entry.names, strict=True)
        )
        return Opcode(leaf, "", d, bool(d & ModRM), entry.kind, children)
    return Opcode(
        leaf,
        entry.mnemonic,
        d,
        bool(d & ModRM),
        dst=entry.dst,
        src=entry.src,
        src2=entry.src2,
        execute=entry.execute,
        in_switch=entry.in_switch,
        check_perm=entry.check_perm,
        intercept=entry.intercept,
        decode_dst=decoders.get(entry.dst),
        decode_src=decoders.get(entry.src),
        decode_src2=decoders.get(entry.src2),
    )


def leaves(table: Iterable[Opcode]) -> Iterable[Opcode]:
    """All leaves of a resolved map, in opcode order."""
    for opcode in table:
        if opcode.kind == KIND_LEAF:
            yield opcode
        else:
            yield from leaves(opcode.children)
