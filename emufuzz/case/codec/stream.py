"""Numbers and bytes of an encoded case: a writer, and a reader to which any bytes make sense.

A number is a tag, of which each of the 256 means something, and for some tags a few more bytes. The
values at which carries, signs and limits change have tags of their own, so that a case is short and
a fuzzer that changes one byte goes from one such value to another:

    0x00 - 0x1f  0 to 31                     0x38 - 0x3e  1 to 7 bytes follow, sign-extended
    0x20 - 0x2f  -1 to -16                   0x3f         one byte follows, which is repeated
    0x30 - 0x37  1 to 8 bytes follow         0x40 - 0x7f  2^k         (k = 0 to 63)
                                             0x80 - 0xbf  2^k - 1     (k = 1 to 64)
                                             0xc0 - 0xff  -2^k        (k = 0 to 63)
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

_REPEATED: Final = 0x0101010101010101
_ONES: Final = tuple((1 << bits) - 1 for bits in range(65))


@lru_cache(maxsize=1 << 16)
def number(value: int, bits: int = 64) -> bytes:
    """The shortest form of an unsigned number that is less than 2^bits; `bits` 1 to 64."""
    ones = _ONES[bits]
    if value < 32:
        return bytes((value,))
    if value > ones - 16:
        return bytes((0x20 + ones - value,))
    if not value & (value - 1):
        return bytes((0x40 + value.bit_length() - 1,))
    if not value & (value + 1):
        return bytes((0x80 + value.bit_length() - 1,))
    negative = ones + 1 - value
    if not negative & (negative - 1):
        return bytes((0xC0 + negative.bit_length() - 1,))
    if value == (value & 0xFF) * _REPEATED & ones:
        return bytes((0x3F, value & 0xFF))
    return _with_bytes(value, negative, ones)


def _with_bytes(value: int, negative: int, ones: int) -> bytes:
    size = (value.bit_length() + 7) // 8
    signed = (2 * negative - 1).bit_length() // 8 + 1
    if signed < size and signed < 8:
        return bytes((0x37 + signed,)) + (value & _ONES[8 * signed]).to_bytes(signed, "little")
    return bytes((0x2F + size,)) + (value & ones).to_bytes(size, "little")


class Source:
    """Bytes of an encoded case. Behind their end there are zeros, and `take` gives less than it should."""

    __slots__ = ("data", "place")

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = 0

    @property
    def ended(self) -> bool:
        """Whether everything has been read."""
        return self.place >= len(self.data)

    def byte(self) -> int:
        """The next byte."""
        place = self.place
        if place >= len(self.data):
            return 0
        self.place = place + 1
        return self.data[place]

    def take(self, count: int) -> bytes:
        """The next `count` bytes, or as many as there are."""
        data = self.data[self.place : self.place + count]
        self.place += len(data)
        return data

    def fixed(self, count: int) -> int:
        """A number of `count` bytes, little-endian."""
        return int.from_bytes(self.take(count), "little")

    def number(self, bits: int = 64) -> int:
        """A number below 2^bits; whatever it is, it is cut down to that."""
        tag, ones = self.byte(), _ONES[bits]
        if tag < 0x20:
            return tag & ones
        if tag >= 0xC0:
            return -(1 << (tag & 0x3F)) & ones
        if tag >= 0x80:
            return _ONES[(tag & 0x3F) + 1] & ones
        if tag >= 0x40:
            return 1 << (tag & 0x3F) & ones
        if tag < 0x30:
            return 0x1F - tag & ones
        if tag < 0x38:
            return self.fixed(tag - 0x2F) & ones
        if tag < 0x3F:
            return int.from_bytes(self.take(tag - 0x37), "little", signed=True) & ones
        return self.byte() * _REPEATED & ones

    def below(self, limit: int) -> int:
        """A number from 0 to limit - 1."""
        return self.number() % limit


def mask(flags: list[bool]) -> bytes:
    """Flags as bits, the first one the lowest, in as few bytes as hold them."""
    value = sum(1 << i for i, flag in enumerate(flags) if flag)
    return value.to_bytes((len(flags) + 7) // 8, "little")
