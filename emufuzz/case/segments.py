"""Segments and the tables in memory that describe them: descriptors, GDT, TSS (SDM Vol. 3A 3.4.5, 7.2)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from emufuzz.arch.descriptors import (
    DESC_ACCESSED,
    DESC_CODE,
    DESC_CONFORMING,
    DESC_EXPAND_DOWN,
    DESC_READABLE,
    DESC_WRITABLE,
    DescStruct,
)
from emufuzz.case.model import Segment

FLAT_LIMIT: Final = 0xFFFFFFFF

#: System descriptor types (SDM Vol. 3A Table 3-2).
TYPE_LDT: Final = 2
TYPE_TSS16_BUSY: Final = 3
TYPE_TSS_BUSY: Final = 11  # 32-bit, and 64-bit in IA-32e mode

TSS16_SIZE: Final = 0x2C
TSS_SIZE: Final = 0x68  # of the 32-bit and of the 64-bit TSS
IO_BITMAP_SIZE: Final = 0x80  # one bit per port: 0 to 0x3ff; those above are beyond the limit and so closed


def segment_code(
    sel: int,
    *,
    bits: int = 32,
    dpl: int = 0,
    base: int = 0,
    limit: int = FLAT_LIMIT,
    readable: bool = True,
    conforming: bool = False,
) -> Segment:
    """A code segment of 16, 32 or 64 bits; `limit` in bytes, `sel` with its RPL.

    Raises:
        ValueError: the limit is above 1 MiB and does not end with a page.
    """
    kind = DESC_CODE | DESC_ACCESSED
    kind |= DESC_READABLE if readable else 0
    kind |= DESC_CONFORMING if conforming else 0
    return Segment(
        sel=sel, base=base, limit=limit, type=kind, s=1, dpl=dpl, p=1,
        l=int(bits == 64), db=int(bits == 32), g=granularity(limit),
    )  # fmt: skip


def segment_data(
    sel: int,
    *,
    bits: int = 32,
    dpl: int = 0,
    base: int = 0,
    limit: int = FLAT_LIMIT,
    writable: bool = True,
    expand_down: bool = False,
) -> Segment:
    """A data or stack segment; `limit` in bytes: the last offset inside, or of an expand-down one below.

    Raises:
        ValueError: the limit is above 1 MiB and does not end with a page.
    """
    kind = DESC_ACCESSED
    kind |= DESC_WRITABLE if writable else 0
    kind |= DESC_EXPAND_DOWN if expand_down else 0
    return Segment(
        sel=sel, base=base, limit=limit, type=kind, s=1, dpl=dpl, p=1,
        db=int(bits != 16), g=granularity(limit),
    )  # fmt: skip


def segment_paragraph(sel: int, *, vm86: bool = False, code: bool = False) -> Segment:
    """A segment of real or virtual-8086 mode: base = selector * 16, limit 64 KiB.

    Virtual-8086 mode makes all of them writable data of DPL 3 (SDM Vol. 3C 27.3.1.2).
    """
    kind = DESC_ACCESSED | DESC_WRITABLE | (DESC_CODE if code and not vm86 else 0)
    return Segment(sel=sel, base=sel << 4, limit=0xFFFF, type=kind, s=1, dpl=3 if vm86 else 0, p=1)


def granularity(limit: int) -> int:
    """The G bit that a limit in bytes needs.

    Raises:
        ValueError: no descriptor can hold the limit.
    """
    if limit <= 0xFFFFF:
        return 0
    if limit & 0xFFF != 0xFFF or limit > FLAT_LIMIT:
        raise ValueError(f"limit {limit:#x} needs G=1 and so must end in 0xfff, up to 0xffffffff")
    return 1


def descriptor_bytes(segment: Segment, *, wide: bool = False) -> bytes:
    """The descriptor that loads `segment`: 8 bytes, or with `wide` the 16 of a 64-bit system descriptor."""
    low = DescStruct(
        base=segment.base,
        limit=segment.limit >> 12 if segment.g else segment.limit,
        type=segment.type,
        s=segment.s,
        dpl=segment.dpl,
        p=segment.p,
        avl=segment.avl,
        l=segment.l,
        d=segment.db,
        g=segment.g,
    ).pack()
    return low + (segment.base >> 32).to_bytes(8, "little") if wide else low


def gdt_bytes(segments: Iterable[Segment], *, long_mode: bool = False) -> bytes:
    """A GDT in which every usable segment's descriptor lies where its selector points.

    Selectors that refer to the LDT and null selectors are passed over. In long mode the
    descriptors of system segments take two slots. Slot 0 is the null descriptor.
    """
    table = bytearray(8)
    for segment in segments:
        slot = segment.sel & ~7
        if not segment.p or not slot or segment.sel & 4:
            continue
        data = descriptor_bytes(segment, wide=long_mode and not segment.s)
        table.extend(bytes(max(0, slot + len(data) - len(table))))
        table[slot : slot + len(data)] = data
    return bytes(table)


def tss_bytes(*, bits: int = 32, sp0: int = 0, ss0: int = 0, io_allowed: bool = True) -> bytes:
    """A TSS of 16, 32 or 64 bits with the stack of CPL 0; with an I/O bitmap unless it is 16 bits.

    The bitmap (SDM Vol. 1 19.5.2) opens the first 1024 ports if `io_allowed`, else no port.
    """
    if bits == 16:
        tss = bytearray(TSS16_SIZE)
        tss[2:4] = (sp0 & 0xFFFF).to_bytes(2, "little")
        tss[4:6] = ss0.to_bytes(2, "little")
        return bytes(tss)
    tss = bytearray(TSS_SIZE)
    tss[4 : 12 if bits == 64 else 8] = sp0.to_bytes(8 if bits == 64 else 4, "little")
    if bits == 32:
        tss[8:10] = ss0.to_bytes(2, "little")
    tss[0x66:0x68] = TSS_SIZE.to_bytes(2, "little")
    ports = b"\x00" if io_allowed else b"\xff"
    return bytes(tss) + ports * IO_BITMAP_SIZE + b"\xff"
