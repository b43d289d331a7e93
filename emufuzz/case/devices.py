"""The devices that a case declares (`devices`, `port_in`), and the trace of what was asked of them.

Both sides of a comparison give the guest the same answers by using this model, and are compared by
their traces: order, address, size, direction and data of every access (docs/case-format.md, Devices).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple

from emufuzz.case.fields import DEVICE_TRACE, DEVICES, MAX_ACCESS, MAX_MEMORY
from emufuzz.case.model import PAGE_SHIFT, Case
from emufuzz.case.read import reader
from emufuzz.case.spec import FieldError

MMIO: Final = "mmio"
PIO: Final = "pio"

#: What lies where: field of the first address, field of the other kind, end of the address space.
_SPACES: Final = {
    MMIO: ("addr", "port", 1 << 64),
    PIO: ("port", "addr", 1 << 16),
}
_read_declared: Final = reader(DEVICES)
_read_trace: Final = reader(DEVICE_TRACE)


class DeviceAccess(NamedTuple):
    """One access: `addr` is guest-physical or a port, `data` its `size` bytes in memory order."""

    kind: str
    addr: int
    size: int
    write: bool
    data: bytes


class _Stream:
    """Every read takes the next bytes of a stream, which goes on with 0xff; writes vanish."""

    def __init__(self, reads: bytes) -> None:
        self._reads = reads
        self._taken = 0

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002 - a stream has no addresses
        data = self._reads[self._taken : self._taken + size]
        self._taken += size
        return data.ljust(size, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        """Writes vanish."""


class _Ram:
    """Keeps what is written; `reads`, then zeros, before that."""

    def __init__(self, reads: bytes) -> None:
        self._initial = reads
        self._written: dict[int, int] = {}  # offset -> byte; devices may be large, accesses are few

    def read(self, offset: int, size: int) -> bytes:
        before = self._initial[offset : offset + size].ljust(size, b"\0")
        return bytes(self._written.get(offset + i, byte) for i, byte in enumerate(before))

    def write(self, offset: int, data: bytes) -> None:
        self._written.update(enumerate(data, offset))


class _Float:
    """Nothing drives the bus: reads are all ones, writes vanish."""

    def __init__(self, reads: bytes) -> None:
        """`reads` has no meaning here."""

    def read(self, offset: int, size: int) -> bytes:  # noqa: ARG002 - the same everywhere
        return b"\xff" * size

    def write(self, offset: int, data: bytes) -> None:
        """Writes vanish."""


_BEHAVIOURS: Final[dict[str, type[_Stream | _Ram | _Float]]] = {
    "stream": _Stream,
    "ram": _Ram,
    "float": _Float,
}


class _Device(NamedTuple):
    """A device at [start, end) of its address space."""

    start: int
    end: int
    behaviour: _Stream | _Ram | _Float


class Devices:
    """The machine's devices, in the state that their accesses so far have left them in.

    Args:
        declared: a case's `devices`, as decoded JSON.
        port_in: what ports without a device answer, before 0xff.

    Raises:
        CaseError: a device is malformed, lies beyond its address space, or overlaps another one.
    """

    def __init__(self, declared: Sequence[Mapping[str, Any]] = (), port_in: bytes = b"") -> None:
        self.trace: list[DeviceAccess] = []
        self._mmio: list[_Device] = []
        self._pio: list[_Device] = []
        self._others = _Stream(port_in)
        if declared:
            self._attach(read_devices(list(declared)))

    def _attach(self, declared: list[dict[str, Any]]) -> None:
        for fields in declared:
            start = fields[_SPACES[fields["kind"]][0]]
            behaviour = _BEHAVIOURS[fields.get("behaviour", "stream")](fields.get("reads", b""))
            space = self._mmio if fields["kind"] == MMIO else self._pio
            space.append(_Device(start, start + fields["size"], behaviour))
        self._mmio.sort(key=lambda device: device.start)

    def mmio_ranges(self) -> list[tuple[int, int]]:
        """(start, end) of each MMIO device, guest-physical, `end` exclusive, in ascending order."""
        return [(device.start, device.end) for device in self._mmio]

    def page_numbers(self) -> frozenset[int]:
        """Numbers (address >> 12) of the 4 KiB pages that MMIO devices lie in."""
        return frozenset(
            page
            for start, end in self.mmio_ranges()
            for page in range(start >> PAGE_SHIFT, (end - 1 >> PAGE_SHIFT) + 1)
        )

    def mmio_read(self, gpa: int, size: int) -> bytes:
        """Read 1 to 8 bytes; where no device is, the bus floats (all ones)."""
        _check_size(size)
        data = bytearray(b"\xff" * size)
        for device, low, high in self._mmio_parts(gpa, size):
            data[low - gpa : high - gpa] = device.behaviour.read(low - device.start, high - low)
        self.trace.append(DeviceAccess(MMIO, gpa, size, write=False, data=bytes(data)))
        return bytes(data)

    def mmio_write(self, gpa: int, data: bytes) -> None:
        """Write 1 to 8 bytes; where no device is, they vanish."""
        _check_size(len(data))
        for device, low, high in self._mmio_parts(gpa, len(data)):
            device.behaviour.write(low - device.start, data[low - gpa : high - gpa])
        self.trace.append(DeviceAccess(MMIO, gpa, len(data), write=True, data=bytes(data)))

    def _mmio_parts(self, gpa: int, size: int) -> list[tuple[_Device, int, int]]:
        """The devices that an access touches, with the part [low, high) of it that each one sees."""
        return [
            (device, max(gpa, device.start), min(gpa + size, device.end))
            for device in self._mmio
            if device.start < gpa + size and gpa < device.end
        ]

    def pio_in(self, port: int, size: int, count: int = 1) -> bytes:
        """IN (count 1) or INS: `count` accesses of `size` bytes (1 to 8) to one port, joined."""
        _check_size(size)
        return b"".join(self._pio_read(port, size) for _ in range(count))

    def _pio_read(self, port: int, size: int) -> bytes:
        device = self._port(port)
        if device is None:
            data = self._others.read(port, size)
        else:
            inside = min(size, device.end - port)
            data = device.behaviour.read(port - device.start, inside).ljust(size, b"\xff")
        self.trace.append(DeviceAccess(PIO, port, size, write=False, data=data))
        return data

    def pio_out(self, port: int, size: int, data: bytes) -> None:
        """OUT or OUTS: one access of `size` bytes (1 to 8) to a port after the other until `data` ends."""
        _check_size(size)
        if len(data) % size:
            raise ValueError(f"{len(data)} bytes are not a multiple of {size}")
        device = self._port(port)
        for start in range(0, len(data), size):
            element = bytes(data[start : start + size])
            if device is not None:
                device.behaviour.write(port - device.start, element[: device.end - port])
            self.trace.append(DeviceAccess(PIO, port, size, write=True, data=element))

    def _port(self, port: int) -> _Device | None:
        """The device that covers a port; it gets the whole access, less what reaches over its end."""
        return next((device for device in self._pio if device.start <= port < device.end), None)


def _check_size(size: int) -> None:
    if not 1 <= size <= MAX_ACCESS:
        raise ValueError(f"an access of {size} bytes, not 1 to {MAX_ACCESS}")


def devices_of(case: Case) -> Devices:
    """Fresh devices of a case."""
    return Devices((case.extra or {}).get("devices", ()), case.port_in)


def read_devices(declared: Any) -> list[dict[str, Any]]:
    """A case's `devices` with numbers and bytes as such.

    Raises:
        CaseError: a device is malformed, lies beyond its address space, or overlaps another one.
    """
    try:
        devices: list[dict[str, Any]] = _read_declared(declared)
    except FieldError as error:
        raise error.under("devices") from None
    check_devices(devices)
    return devices


def check_devices(devices: list[dict[str, Any]]) -> None:
    """What the declarations of single fields cannot tell about devices that were read; CaseError names it."""
    try:
        for index, fields in enumerate(devices):
            _check_device(fields, f"[{index}]")
        for kind in _SPACES:
            _check_overlaps(devices, kind)
        _check_total(devices)
    except FieldError as error:
        raise error.under("devices") from None


def _check_device(fields: dict[str, Any], where: str) -> None:
    try:
        _check_place(fields)
        _check_reads(fields)
    except FieldError as error:
        raise error.under(where) from None


def _check_total(devices: list[dict[str, Any]]) -> None:
    if sum(fields["size"] for fields in devices if fields["kind"] == MMIO) > MAX_MEMORY:
        raise FieldError(f"more than {MAX_MEMORY >> 20} MiB of MMIO")


def _check_place(fields: dict[str, Any]) -> None:
    kind = fields["kind"]
    first, other, end = _SPACES[kind]
    if first not in fields:
        raise FieldError("missing", first)
    if other in fields:
        raise FieldError(f"a device of kind {kind} has none", other)
    if fields[first] + fields["size"] > end:
        raise FieldError(f"reaches beyond {first} {end - 1:#x}", "size")


def _check_reads(fields: dict[str, Any]) -> None:
    reads = fields.get("reads", b"")
    if fields.get("behaviour") == "ram" and len(reads) > fields["size"]:
        raise FieldError(f"{len(reads)} bytes are more than the device's size of {fields['size']}", "reads")


def _check_overlaps(devices: list[dict[str, Any]], kind: str) -> None:
    first = _SPACES[kind][0]
    ranges = sorted(
        (fields[first], fields[first] + fields["size"], index)
        for index, fields in enumerate(devices)
        if fields["kind"] == kind
    )
    for (_, end, below), (start, _, above) in pairwise(ranges):
        if start < end:
            raise FieldError(f"overlaps devices[{min(below, above)}]", f"[{max(below, above)}].{first}")


def trace_to_obj(trace: Iterable[DeviceAccess]) -> list[dict[str, Any]]:
    """A trace in the form of an outcome's `device_trace`."""
    return [
        {
            "kind": access.kind,
            **({"addr": hex(access.addr)} if access.kind == MMIO else {"port": access.addr}),
            "size": access.size,
            "direction": "write" if access.write else "read",
            "data": access.data.hex(),
        }
        for access in trace
    ]


def trace_from_obj(value: Any) -> list[DeviceAccess]:
    """The trace that an outcome's `device_trace` stands for.

    Raises:
        CaseError: an access is malformed.
    """
    return check_device_trace(_read_trace(value))


def check_device_trace(accesses: list[dict[str, Any]]) -> list[DeviceAccess]:
    """The trace of read accesses; CaseError if one has fields that contradict each other."""
    trace: list[DeviceAccess] = []
    try:
        for fields in accesses:
            trace.append(_access_of(fields))  # noqa: PERF401 - the length tells which one failed
    except FieldError as error:
        raise error.under(f"device_trace[{len(trace)}]") from None
    return trace


def _access_of(fields: dict[str, Any]) -> DeviceAccess:
    kind, size, data = fields["kind"], fields["size"], fields["data"]
    first, other, _ = _SPACES[kind]
    if first not in fields:
        raise FieldError("missing", first)
    if other in fields:
        raise FieldError(f"an access of kind {kind} has none", other)
    if len(data) != size:
        raise FieldError(f"{len(data)} bytes, but the size is {size}", "data")
    return DeviceAccess(kind, fields[first], size, fields["direction"] == "write", data)
