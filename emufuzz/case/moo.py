"""Reader of MOO files: the binary form of the SingleStepTests for the 8088 to 80386 (docs/moo.md).

A file is a sequence of chunks, each a type of four characters, a length (u32, little-endian) and as
many bytes. The reader is strict: a length, count or mask that does not fit is an error that names the
file, the test, the chunk and the reason. Chunks of other types are skipped, as the format demands.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from emufuzz.case.errors import CaseError

MAX_FILE: Final = 512 << 20  # bytes, decompressed
MAX_TESTS: Final = 1 << 20
MAX_RAM: Final = 1 << 16  # entries of one RAM chunk
MAX_CYCLES: Final = 1 << 20
MAX_NAME: Final = 4096  # characters
MAX_BYTES: Final = 64  # bytes of one instruction, and of the prefetch queue

_GZIP_MAGIC: Final = b"\x1f\x8b"
_HEAD: Final = struct.Struct("<4sI")
_HEADER: Final = struct.Struct("<BB2xI4s")
_EXCEPTION: Final = struct.Struct("<BI")
_ADDRESS: Final = struct.Struct("<BHIIIII")
_RAM_ENTRY: Final = struct.Struct("<IB")
_CYCLE: Final = struct.Struct("<BI10x")
_HASH: Final = 20
_ALE: Final = 1  # bit of a cycle's first byte: the address is valid

# fmt: off
#: Registers in the order of the mask's bits, under the names of the exchange format.
REGISTERS_16: Final = (
    "rax", "rbx", "rcx", "rdx", "cs", "ss", "ds", "es", "rsp", "rbp", "rsi", "rdi", "rip", "rflags",
)
REGISTERS_32: Final = (
    "cr0", "cr3", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp",
    "cs", "ds", "es", "fs", "gs", "ss", "rip", "rflags", "dr6", "dr7",
)
#: Type of a register chunk, or of one of masks -> bytes of the bitmask and of each value, names.
_REGISTERS: Final = {
    "REGS": (2, REGISTERS_16),
    "RG32": (4, REGISTERS_32),
    "RMSK": (2, REGISTERS_16),
    "RM32": (4, REGISTERS_32),
}
# fmt: on
_VALUES: Final = ("REGS", "RG32")
_STATE_CHUNKS: Final = frozenset((*_REGISTERS, "RAM ", "QUEU", "EA32"))
_VERSIONS: Final = ((1, 0), (1, 1))


class EffectiveAddress(NamedTuple):
    """What an EA32 chunk says of the memory operand: the segment it goes through, and its offset."""

    selector: int
    base: int
    limit: int
    offset: int


class MooState(NamedTuple):
    """INIT or FINA.

    Attributes:
        wide: 32-bit registers (RG32), not the 16-bit ones (REGS).
        registers: Name -> value; all of them in INIT, those that changed in FINA.
        ram: Physical address -> byte; of two entries for an address the later one counts.
        address: The memory operand, if there is an EA32 chunk.
        unknown: Types of chunks that this reader does not know.
    """

    wide: bool
    registers: dict[str, int]
    ram: dict[int, int]
    address: EffectiveAddress | None
    unknown: tuple[str, ...]


class MooTest(NamedTuple):
    """One TEST chunk.

    Attributes:
        number: Its number in the file it was made for.
        name: Disassembly.
        code: The instruction's bytes; with the HLT after it in suites that have one.
        initial: State before the instruction, with every register.
        final: What changed.
        exception: Number and physical address of the flags that were pushed, if there was one.
        latched: Addresses that the bus cycles put on the bus, ports included.
        hash: SHA-1 that identifies the test, in hexadecimal; empty without a HASH chunk.
    """

    number: int
    name: str
    code: bytes
    initial: MooState
    final: MooState
    exception: tuple[int, int] | None
    latched: frozenset[int]
    hash: str


class MooFile(NamedTuple):
    """A file whose header was read: the processor, the number of tests, and all top-level chunks."""

    path: Path
    cpu: str
    announced: int
    data: memoryview

    def tests(self) -> Iterator[MooTest]:
        """The tests, one by one.

        Raises:
            CaseError: a chunk is not valid, or there are more or fewer tests than the header says.
        """
        done = 0
        try:
            for kind, data in _chunks(self.data, ""):
                if kind == "TEST":
                    yield _test(data, f"TEST {done}: ")
                    done += 1
                elif kind in _REGISTERS:
                    _registers(kind, data, "")
            if done != self.announced:
                raise CaseError(f"MOO : {self.announced} tests announced, {done} found")  # noqa: TRY301 - gets the file's name below
        except CaseError as error:
            raise CaseError(f"{self.path}: {error}") from None


def is_moo(path: str | Path) -> bool:
    """Whether a file's name ends in .moo or .moo.gz, in any case."""
    return str(path).lower().endswith((".moo", ".moo.gz"))


def open_moo(path: str | Path) -> MooFile:
    """The file, plain or compressed with gzip, its header read.

    Raises:
        CaseError: it cannot be read, is larger than MAX_FILE, or its first chunk is no MOO header.
    """
    path = Path(path)
    try:
        data = memoryview(_contents(path))
        kind, header = next(_chunks(data, ""), ("", data))
        if kind != "MOO ":
            raise CaseError("the first chunk is not MOO")  # noqa: TRY301 - gets the file's name below
        cpu, count = _header(header)
    except CaseError as error:
        raise CaseError(f"{path}: {error}") from None
    return MooFile(path, cpu, count, data[_HEAD.size + len(header) :])


def _contents(path: Path) -> bytes:
    try:
        with path.open("rb") as raw:
            packed = raw.peek(2)[:2] == _GZIP_MAGIC
            data = (gzip.GzipFile(fileobj=raw) if packed else raw).read(MAX_FILE + 1)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CaseError(f"not readable as gzip: {error}") from None
    except OSError as error:
        raise CaseError(f"{error.strerror or error}") from None
    if len(data) > MAX_FILE:
        raise CaseError(f"more than {MAX_FILE >> 20} MiB")
    return data


def _header(data: memoryview) -> tuple[str, int]:
    """The processor's name and the number of tests; later versions may have more fields after them."""
    if len(data) < _HEADER.size:
        raise CaseError(f"MOO : {len(data)} bytes, at least {_HEADER.size} are needed")
    major, minor, count, cpu = _HEADER.unpack_from(data)
    if (major, minor) not in _VERSIONS:
        raise CaseError(f"MOO : version {major}.{minor} is not known")
    if count > MAX_TESTS:
        raise CaseError(f"MOO : {count} tests are too many (max {MAX_TESTS})")
    return _text(cpu, "MOO : processor").rstrip(), count


def _chunks(data: memoryview, where: str) -> Iterator[tuple[str, memoryview]]:
    """The chunks that `data` consists of, as (type, payload)."""
    at = 0
    while at < len(data):
        if len(data) - at < _HEAD.size:
            raise CaseError(f"{where}{len(data) - at} bytes at the end are too few for a chunk")
        raw, size = _HEAD.unpack_from(data, at)
        kind = _text(raw, f"{where}chunk type")
        at += _HEAD.size
        if size > len(data) - at:
            raise CaseError(f"{where}{kind}: length {size}, but only {len(data) - at} bytes are left")
        yield kind, data[at : at + size]
        at += size


def _text(raw: bytes, what: str) -> str:
    if not raw.isascii() or not raw.decode("ascii").isprintable():
        raise CaseError(f"{what}: {raw!r} is not printable ASCII")
    return raw.decode("ascii")


def _by_type(data: memoryview, where: str) -> dict[str, memoryview]:
    """The chunks by their type, of which there may be one each."""
    found: dict[str, memoryview] = {}
    for kind, payload in _chunks(data, where):
        if kind in found:
            raise CaseError(f"{where}{kind}: given twice")
        found[kind] = payload
    return found


def _test(data: memoryview, where: str) -> MooTest:
    if len(data) < 4:
        raise CaseError(f"{where}{len(data)} bytes are too few")
    chunks = _by_type(data[4:], where)
    for kind in ("BYTS", "INIT", "FINA"):
        if kind not in chunks:
            raise CaseError(f"{where}{kind}: missing")
    code = _counted(chunks["BYTS"], f"{where}BYTS: ", 1, MAX_BYTES).tobytes()
    if not code:
        raise CaseError(f"{where}BYTS: empty")
    initial, final = _state(chunks["INIT"], f"{where}INIT: "), _state(chunks["FINA"], f"{where}FINA: ")
    _check_complete(initial, f"{where}INIT: ")
    if initial.wide != final.wide:
        raise CaseError(f"{where}FINA: registers of another size than in INIT")
    return MooTest(
        number=int.from_bytes(data[:4], "little"),
        name=_name(chunks, where),
        code=code,
        initial=initial,
        final=final,
        exception=_exception(chunks, where),
        latched=_latched(chunks, where),
        hash=_exact(chunks, "HASH", _HASH, where).hex(),
    )


def _counted(data: memoryview, where: str, size: int, most: int) -> memoryview:
    """What follows a count of items of `size` bytes, which must be exactly as many."""
    if len(data) < 4:
        raise CaseError(f"{where}{len(data)} bytes are too few for a count")
    count = int.from_bytes(data[:4], "little")
    if count > most:
        raise CaseError(f"{where}count {count} is too large (max {most})")
    if len(data) != 4 + count * size:
        raise CaseError(f"{where}{len(data) - 4} bytes, {count} entries of {size} need {count * size}")
    return data[4:]


def _exact(chunks: dict[str, memoryview], kind: str, size: int, where: str) -> bytes:
    """The payload of an optional chunk of a fixed size, empty if there is none."""
    if kind not in chunks:
        return b""
    if len(chunks[kind]) != size:
        raise CaseError(f"{where}{kind}: {len(chunks[kind])} bytes, {size} are needed")
    return chunks[kind].tobytes()


def _name(chunks: dict[str, memoryview], where: str) -> str:
    if "NAME" not in chunks:
        return ""
    raw = _counted(chunks["NAME"], f"{where}NAME: ", 1, MAX_NAME).tobytes()
    return _text(raw, f"{where}NAME")


def _exception(chunks: dict[str, memoryview], where: str) -> tuple[int, int] | None:
    raw = _exact(chunks, "EXCP", _EXCEPTION.size, where)
    if not raw:
        return None
    number, flags_at = _EXCEPTION.unpack(raw)
    return number, flags_at


def _latched(chunks: dict[str, memoryview], where: str) -> frozenset[int]:
    if "CYCL" not in chunks:
        return frozenset()
    cycles = _counted(chunks["CYCL"], f"{where}CYCL: ", _CYCLE.size, MAX_CYCLES)
    return frozenset(address for pins, address in _CYCLE.iter_unpack(cycles) if pins & _ALE)


def _state(data: memoryview, where: str) -> MooState:
    chunks = _by_type(data, where)
    kinds = [kind for kind in _VALUES if kind in chunks]
    if len(kinds) != 1:
        raise CaseError(f"{where}exactly one of {' and '.join(_VALUES)} is needed, got {len(kinds)}")
    values = {kind: _registers(kind, chunks[kind], where) for kind in _REGISTERS if kind in chunks}
    ram = _counted(chunks.get("RAM ", memoryview(bytes(4))), f"{where}RAM : ", _RAM_ENTRY.size, MAX_RAM)
    _counted(chunks.get("QUEU", memoryview(bytes(4))), f"{where}QUEU: ", 1, MAX_BYTES)
    return MooState(
        wide=kinds[0] == "RG32",
        registers=values[kinds[0]],
        ram=dict(_RAM_ENTRY.iter_unpack(ram)),
        address=_address(chunks, where),
        unknown=tuple(sorted(chunks.keys() - _STATE_CHUNKS)),
    )


def _registers(kind: str, data: memoryview, where: str) -> dict[str, int]:
    """The registers of a bitmask and its values."""
    size, names = _REGISTERS[kind]
    mask = int.from_bytes(data[:size], "little")
    if len(data) < size:
        raise CaseError(f"{where}{kind}: {len(data)} bytes are too few for a mask")
    if mask >> len(names):
        raise CaseError(f"{where}{kind}: mask {mask:#x} has bits for which there is no register")
    needed = size * (1 + mask.bit_count())
    if len(data) != needed:
        raise CaseError(f"{where}{kind}: {len(data)} bytes, mask {mask:#x} needs {needed}")
    chosen = [name for bit, name in enumerate(names) if mask >> bit & 1]
    values = struct.unpack(f"<{len(chosen)}{'H' if size == 2 else 'I'}", data[size:])
    return dict(zip(chosen, values, strict=True))


def _check_complete(initial: MooState, where: str) -> None:
    names = REGISTERS_32 if initial.wide else REGISTERS_16
    missing = [name for name in names if name not in initial.registers]
    if missing:
        raise CaseError(f"{where}registers: {missing[0]} is missing")


def _address(chunks: dict[str, memoryview], where: str) -> EffectiveAddress | None:
    raw = _exact(chunks, "EA32", _ADDRESS.size, where)
    if not raw:
        return None
    _, selector, base, limit, offset, _, _ = _ADDRESS.unpack(raw)
    return EffectiveAddress(selector, base, limit, offset)
