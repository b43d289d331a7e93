"""Writer of MOO files (docs/moo.md): the tests of a file as `emufuzz.case.moo` reads them, to bytes.

Versions 1.0 and 1.1 differ in the chunks that they know: 32-bit registers came with 1.1.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from emufuzz.case.moo import REGISTERS_16, REGISTERS_32, MooState, MooTest

VERSIONS: Final = ((1, 0), (1, 1))
#: cpu_type of META for a processor that its enumeration does not have.
_OTHER_CPU: Final = 0xFF
_REAL_MODE: Final = 0
_SEVERAL_OPCODES: Final = 0xFFFFFFFF
_META: Final = struct.Struct("<BBBI8sIQB3x")
_GENERATOR: Final = struct.Struct("<QH")


class MooHeader(NamedTuple):
    """What a file says of itself.

    Attributes:
        cpu: At most four ASCII characters.
        version: One of VERSIONS.
        mnemonic: Of all tests, at most eight ASCII characters; empty if there are several.
        seed: Of the generator, 0 if none.
    """

    cpu: str
    version: tuple[int, int] = (1, 1)
    mnemonic: str = ""
    seed: int = 0


def moo_bytes(header: MooHeader, tests: Sequence[MooTest], masks: Sequence[Mapping[str, int]] = ()) -> bytes:
    """A file.

    Args:
        header: What comes before the tests.
        tests: The tests; their numbers are those of the file.
        masks: For each test the bits of registers that are defined, by name; registers that are not
            named are defined as a whole. None for any test by default.

    Raises:
        ValueError: The version has no chunk for 32-bit registers, or there is no such version.
    """
    if header.version not in VERSIONS:
        raise ValueError(f"version {header.version} is not one of {VERSIONS}")
    if header.version < (1, 1) and any(test.initial.wide for test in tests):
        raise ValueError("32-bit registers need version 1.1")
    masks = masks or [{}] * len(tests)
    body = b"".join(_test(test, mask, header.seed) for test, mask in zip(tests, masks, strict=True))
    return _header(header, len(tests)) + _meta(header, len(tests)) + body


def _chunk(kind: str, *payload: bytes) -> bytes:
    data = b"".join(payload)
    return struct.pack("<4sI", kind.encode("ascii"), len(data)) + data


def _counted(kind: str, data: bytes, count: int | None = None) -> bytes:
    return _chunk(kind, struct.pack("<I", len(data) if count is None else count), data)


def _header(header: MooHeader, count: int) -> bytes:
    return _chunk(
        "MOO ", struct.pack("<BB2xI4s", *header.version, count, header.cpu.ljust(4).encode("ascii"))
    )


def _meta(header: MooHeader, count: int) -> bytes:
    mnemonic = header.mnemonic.ljust(8)[:8].encode("ascii", "replace")
    return _chunk(
        "META", _META.pack(1, 0, _OTHER_CPU, _SEVERAL_OPCODES, mnemonic, count, header.seed, _REAL_MODE)
    )


def _test(test: MooTest, mask: Mapping[str, int], seed: int) -> bytes:
    parts = [
        _chunk("GMET", _GENERATOR.pack(seed, 0)),
        _counted("NAME", test.name.encode("ascii")),
        _counted("BYTS", test.code),
        _chunk("INIT", _state(test.initial, {})),
        _chunk("FINA", _state(test.final, mask)),
    ]
    if test.exception is not None:
        parts.append(_chunk("EXCP", struct.pack("<BI", *test.exception)))
    digest = bytes.fromhex(test.hash) or hashlib.sha1(b"".join(parts), usedforsecurity=False).digest()
    return _chunk("TEST", struct.pack("<I", test.number), *parts, _chunk("HASH", digest))


def _state(state: MooState, mask: Mapping[str, int]) -> bytes:
    entries = b"".join(struct.pack("<IB", *entry) for entry in state.ram.items())
    masks = _registers("RM32" if state.wide else "RMSK", mask) if mask else b""
    return b"".join(
        (
            _registers("RG32" if state.wide else "REGS", state.registers),
            masks,
            _counted("RAM ", entries, len(state.ram)),
        )
    )


def _registers(kind: str, values: Mapping[str, int]) -> bytes:
    """A mask of the registers that are there, and their values in the order of its bits."""
    wide = kind in ("RG32", "RM32")
    names, letter = (REGISTERS_32, "I") if wide else (REGISTERS_16, "H")
    bits = sum(1 << bit for bit, name in enumerate(names) if name in values)
    chosen = [values[name] for name in names if name in values]
    return _chunk(kind, struct.pack(f"<{letter}{len(chosen)}{letter}", bits, *chosen))
