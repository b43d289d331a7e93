"""Segment descriptors, as in a GDT and as the hidden part of a segment register.

SDM Vol. 3A 3.4.5 "Segment Descriptors".
"""

from __future__ import annotations

from typing import Final

DESC_CODE: Final = 8  # type bit 3: code segment
DESC_EXPAND_DOWN: Final = 4  # of a data segment
DESC_CONFORMING: Final = 4  # of a code segment
DESC_WRITABLE: Final = 2  # of a data segment
DESC_READABLE: Final = 2  # of a code segment
DESC_ACCESSED: Final = 1


class DescStruct:
    """A descriptor, taken apart (struct desc_struct).

    `base` is 32 bits (bits 63:32 of a 64-bit base travel separately, as `base3`), `limit` is the
    raw 20-bit field; `limit_scaled` is the limit in bytes that it stands for.
    """

    __slots__ = ("avl", "base", "d", "dpl", "g", "l", "limit", "limit_scaled", "p", "s", "type")

    def __init__(
        self,
        base: int = 0,
        limit: int = 0,
        type: int = 0,  # noqa: A002 - the architectural name of the field
        s: int = 0,
        dpl: int = 0,
        p: int = 0,
        avl: int = 0,
        l: int = 0,  # noqa: E741 - the architectural name of the bit
        d: int = 0,
        g: int = 0,
    ) -> None:
        self.base = base & 0xFFFFFFFF
        self.limit = limit & 0xFFFFF
        self.type = type
        self.s = s
        self.dpl = dpl
        self.p = p
        self.avl = avl
        self.l = l
        self.d = d
        self.g = g
        self.limit_scaled = (self.limit << 12 | 0xFFF) if g else self.limit

    def copy(self) -> DescStruct:
        """A descriptor of its own with the same fields."""
        return DescStruct(
            self.base, self.limit, self.type, self.s, self.dpl, self.p, self.avl, self.l, self.d, self.g
        )

    def pack(self) -> bytes:
        """The descriptor's 8 bytes in memory order."""
        return (
            self.limit & 0xFFFF
            | (self.base & 0xFFFFFF) << 16
            | self.type << 40
            | self.s << 44
            | self.dpl << 45
            | self.p << 47
            | (self.limit >> 16) << 48
            | self.avl << 52
            | self.l << 53
            | self.d << 54
            | self.g << 55
            | (self.base >> 24) << 56
        ).to_bytes(8, "little")

    @classmethod
    def unpack(cls, data: bytes) -> DescStruct:
        """Take 8 bytes apart."""
        v = int.from_bytes(data[:8], "little")
        return cls(
            base=v >> 16 & 0xFFFFFF | v >> 56 << 24,
            limit=v & 0xFFFF | (v >> 48 & 0xF) << 16,
            type=v >> 40 & 0xF,
            s=v >> 44 & 1,
            dpl=v >> 45 & 3,
            p=v >> 47 & 1,
            avl=v >> 52 & 1,
            l=v >> 53 & 1,
            d=v >> 54 & 1,
            g=v >> 55 & 1,
        )
