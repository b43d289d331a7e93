"""A writer of MOO files for tests (docs/moo.md)."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

from emufuzz.case.moo import REGISTERS_16, REGISTERS_32

Ram = Mapping[int, int]

#: A state in which code at 1000:0100, data at 2000:0 and stack at 3000:0800 do not meet.
START_16: dict[str, int] = dict.fromkeys(REGISTERS_16, 0) | {
    "cs": 0x1000, "ds": 0x2000, "es": 0x2000, "ss": 0x3000, "rsp": 0x800, "rip": 0x100, "rflags": 0xF002,
}  # fmt: skip
START_32: dict[str, int] = dict.fromkeys(REGISTERS_32, 0) | START_16 | {
    "cr0": 0x7FFEFFF0, "rflags": 0xFFFC0002, "dr6": 0xFFFF0FF0,
}  # fmt: skip
CODE_AT = 0x10100
DATA_AT = 0x20000
STACK_AT = 0x30000


def chunk(kind: str, *payload: bytes) -> bytes:
    """One chunk."""
    data = b"".join(payload)
    return struct.pack("<4sI", kind.encode("latin-1"), len(data)) + data


def header(count: int, cpu: str = "C286", version: tuple[int, int] = (1, 1)) -> bytes:
    """The MOO chunk."""
    return chunk("MOO ", struct.pack("<BB2xI4s", *version, count, cpu.ljust(4).encode()))


def counted(kind: str, data: bytes, count: int | None = None) -> bytes:
    """A chunk of bytes with their count before them."""
    return chunk(kind, struct.pack("<I", len(data) if count is None else count), data)


def registers(kind: str, values: Mapping[str, int]) -> bytes:
    """REGS or RMSK, RG32 or RM32."""
    wide = kind in ("RG32", "RM32")
    names = REGISTERS_32 if wide else REGISTERS_16
    mask = sum(1 << bit for bit, name in enumerate(names) if name in values)
    chosen = [values[name] for name in names if name in values]
    letter = "I" if wide else "H"
    return chunk(kind, struct.pack(f"<{letter}{len(chosen)}{letter}", mask, *chosen))


def ram(entries: Ram) -> bytes:
    """A RAM chunk."""
    return counted("RAM ", b"".join(struct.pack("<IB", *entry) for entry in entries.items()), len(entries))


def cycles(addresses: Sequence[int]) -> bytes:
    """A CYCL chunk that latches these addresses, and one cycle that latches none."""
    rows = [struct.pack("<BI10x", 1, address) for address in addresses] + [struct.pack("<BI10x", 0, 0xFFFFFF)]
    return counted("CYCL", b"".join(rows), len(rows))


def state(kind: str, values: Mapping[str, int], memory: Ram, *more: bytes, wide: bool = False) -> bytes:
    """INIT or FINA."""
    return chunk(
        kind, registers("RG32" if wide else "REGS", values), ram(memory), counted("QUEU", b""), *more
    )


def one_test(
    code: bytes,
    after: Mapping[str, int],
    *,
    before: Mapping[str, int] | None = None,
    data: Ram | None = None,
    written: Ram | None = None,
    exception: tuple[int, int] | None = None,
    wide: bool = False,
    number: int = 0,
    name: str = "test",
    init: Sequence[bytes] = (),
    more: Sequence[bytes] = (),
) -> bytes:
    """A TEST chunk; `before` changes START_16 or START_32, the code lies at CODE_AT."""
    values = (START_32 if wide else START_16) | dict(before or {})
    at = (values["cs"] << 4) + values["rip"]
    memory = {at + i: byte for i, byte in enumerate(code)} | dict(data or {})
    parts = [
        struct.pack("<I", number),
        counted("NAME", name.encode("latin-1")),
        counted("BYTS", code),
        state("INIT", values, memory, *init, wide=wide),
        state("FINA", after, written or {}, wide=wide),
    ]
    if exception is not None:
        parts.append(chunk("EXCP", struct.pack("<BI", *exception)))
    return chunk("TEST", *parts, *more)


def frame(ip: int, cs: int, flags: int, at: int) -> dict[int, int]:
    """IP, CS and FLAGS as an exception pushes them at a physical address."""
    return dict(enumerate(struct.pack("<3H", ip, cs, flags), at))


def moo(*tests: bytes, cpu: str = "C286", **changes: Any) -> bytes:
    """A file."""
    return header(changes.pop("count", len(tests)), cpu, **changes) + b"".join(tests)
