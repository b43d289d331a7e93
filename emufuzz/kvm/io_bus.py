"""In-kernel devices: the local APIC and userspace's ioeventfds on KVM's I/O buses.

KVM: kvm_io_bus_read, kvm_io_bus_write, ioeventfd_in_range, vcpu_mmio_read, vcpu_mmio_write.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from emufuzz.kvm.vcpu import Vcpu

# Kinds of the tracepoint kvm_mmio.
KVM_TRACE_MMIO_READ_UNSATISFIED: Final = "unsatisfied-read"
KVM_TRACE_MMIO_READ: Final = "read"
KVM_TRACE_MMIO_WRITE: Final = "write"

KVM_MMIO_BUS: Final = "mmio"
KVM_PIO_BUS: Final = "pio"
KVM_FAST_MMIO_BUS: Final = "fast-mmio"

_PIECE: Final = 8


@dataclass(frozen=True, slots=True)
class Ioeventfd:
    """A write that only wakes somebody: `length` 0 matches any size, `datamatch` None any value."""

    addr: int
    length: int = 0
    datamatch: int | None = None

    def matches(self, addr: int, data: bytes) -> bool:
        """KVM: ioeventfd_in_range."""
        if addr != self.addr:
            return False
        if not self.length:
            return True
        if len(data) != self.length:
            return False
        return self.datamatch is None or int.from_bytes(data, "little") == self.datamatch


class IoBuses:
    """The buses of one VM; on all of them there are only devices that are written to."""

    __slots__ = ("_fds",)

    def __init__(self, declared: Iterable[Mapping[str, Any]] = ()) -> None:
        """`declared` is a case's `kvm.ioeventfds`; one of MMIO without a length is on the fast bus too."""
        self._fds: dict[str, list[Ioeventfd]] = {KVM_MMIO_BUS: [], KVM_PIO_BUS: [], KVM_FAST_MMIO_BUS: []}
        for item in declared:
            match = item.get("datamatch")
            fd = Ioeventfd(item["addr"], item.get("len", 0), match)
            if item.get("port"):
                self._fds[KVM_PIO_BUS].append(fd)
                continue
            self._fds[KVM_MMIO_BUS].append(fd)
            if not fd.length:
                self._fds[KVM_FAST_MMIO_BUS].append(fd)

    def write(self, bus: str, addr: int, data: bytes) -> bool:
        """Whether a device on the bus took the write; the fast bus is written without data."""
        return any(fd.matches(addr, data) for fd in self._fds[bus])


def vcpu_mmio_write(vcpu: Vcpu, buses: IoBuses, addr: int, data: bytes) -> int:
    """How many of the bytes in-kernel devices took, piece by piece of at most 8."""
    handled = 0
    while handled < len(data):
        piece = data[handled : handled + _PIECE]
        taken = vcpu.apic is not None and vcpu.apic.mmio_write(vcpu, addr + handled, piece)
        if not taken and not buses.write(KVM_MMIO_BUS, addr + handled, piece):
            break
        handled += len(piece)
    return handled


def vcpu_mmio_read(vcpu: Vcpu, addr: int, size: int) -> bytes:
    """What in-kernel devices answered, piece by piece of at most 8; shorter if they do not know more."""
    data = b""
    while len(data) < size:
        gpa, length = addr + len(data), min(size - len(data), _PIECE)
        piece = vcpu.apic.mmio_read(vcpu, gpa, length) if vcpu.apic is not None else None
        if piece is None:
            break
        if vcpu.trace is not None:
            val = int.from_bytes(piece, "little")
            vcpu.trace.emit("kvm_mmio", type=KVM_TRACE_MMIO_READ, len=length, gpa=gpa, val=val)
        data += piece
    return data
