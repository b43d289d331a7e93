"""What the child is doing, in memory that the driver sees too, also when the child dies.

bytes 0 - 23   phase, place in the batch, count of marks: three signed 64-bit numbers
bytes 24 - 31  length of the encoded case in work
then           the case
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Final, Self

_NUMBERS: Final = struct.Struct("<qqq")
_LENGTH: Final = struct.Struct("<q")
_CASE: Final = _NUMBERS.size + _LENGTH.size
#: Bytes of an encoded case that are kept; libFuzzer is told to make none that are longer.
LONGEST: Final = 1 << 16
#: What the driver says when time is up: the task ends at the next report.
CUT: Final = "cut"
_SIZE: Final = _CASE + LONGEST


class Mark:
    """A view of the shared memory; both sides have one."""

    def __init__(self, descriptor: int) -> None:
        """Map the memory behind a descriptor, which this object then owns."""
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, _SIZE)
        self._count = 0

    @classmethod
    def create(cls) -> Self:
        """New memory, all zero."""
        descriptor = os.memfd_create("emufuzz-mark")
        os.ftruncate(descriptor, _SIZE)
        return cls(descriptor)

    def progress(self, phase: int, index: int) -> None:
        """Say how far the case in work is."""
        self._count += 1
        _NUMBERS.pack_into(self._memory, 0, phase, index, self._count)

    def case(self, data: bytes) -> None:
        """Say which case is in work."""
        self._memory[_CASE : _CASE + len(data)] = data
        _LENGTH.pack_into(self._memory, _NUMBERS.size, len(data))

    def read(self) -> tuple[int, int, int]:
        """Phase, place, and count of marks."""
        phase, index, count = _NUMBERS.unpack_from(self._memory, 0)
        return phase, index, count

    def read_case(self) -> bytes | None:
        """The case in work; None between cases."""
        (length,) = _LENGTH.unpack_from(self._memory, _NUMBERS.size)
        return self._memory[_CASE : _CASE + length] if 0 < length <= LONGEST else None

    def idle(self) -> None:
        """Say that no case is in work."""
        _LENGTH.pack_into(self._memory, _NUMBERS.size, 0)

    def close(self) -> None:
        """Give the memory up."""
        self._memory.close()
        os.close(self.descriptor)
