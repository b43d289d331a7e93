"""Port I/O: the in-kernel bus, then userspace; from the emulator and, for plain IN and OUT, without it.

KVM: emulator_pio_in_out, complete_emulator_pio_in, kvm_fast_pio, complete_fast_pio_in,
complete_fast_pio_out, complete_fast_pio_out_port_0x7e.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.regs import VCPU_REGS_RAX
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.io_bus import KVM_PIO_BUS, IoBuses
from emufuzz.kvm.rflags import kvm_get_linear_rip, kvm_is_linear_rip
from emufuzz.kvm.vcpu import Vcpu

KVM_EXIT_IO: Final = "IO"

_MASK64: Final = (1 << 64) - 1
_READ, _WRITE = "read", "write"  # of the tracepoint kvm_pio
_SLOW_PORT: Final = 0x7E
_READ_AHEAD: Final = 1024


class PioRequest:
    """vcpu->arch.pio and pio_data. `count` 0 = nothing is asked of userspace.

    `read_ahead` is the emulator's buffer for IN (io_read.data), which keeps what it held before.
    """

    __slots__ = ("count", "data", "in_", "linear_rip", "port", "read_ahead", "size")

    def __init__(self) -> None:
        self.count = 0
        self.port = 0
        self.size = 0
        self.in_ = False
        self.data = b""
        self.linear_rip = 0
        self.read_ahead = bytearray(_READ_AHEAD)


def _trace_pio(vcpu: Vcpu, rw: str, port: int, size: int, count: int, data: bytes) -> None:
    if vcpu.trace is not None:
        value = int.from_bytes(data[:size], "little")
        vcpu.trace.emit("kvm_pio", rw=rw, port=port, size=size, count=count, val=value)


def _to_userspace(
    vcpu: Vcpu, pio: PioRequest, size: int, port: int, data: bytes, count: int, in_: bool
) -> None:
    pio.port, pio.size, pio.count, pio.in_ = port, size, count, in_
    pio.data = data
    vcpu.run.leave(
        KVM_EXIT_IO,
        direction="in" if in_ else "out",
        size=size,
        port=port,
        count=count,
        data=data,
    )


def emulator_pio_in(vcpu: Vcpu, pio: PioRequest, size: int, port: int, count: int) -> bytes | None:
    """Ask userspace for `count` elements of `size` bytes: always None, the answer comes at the next KVM_RUN.

    No device of the in-kernel bus can be read.
    """
    _to_userspace(vcpu, pio, size, port, bytes(size * count), count, True)
    return None


def complete_emulator_pio_in(vcpu: Vcpu, pio: PioRequest) -> bytes:
    """What userspace answered."""
    _trace_pio(vcpu, _READ, pio.port, pio.size, pio.count, pio.data)
    pio.count = 0
    return pio.data


def emulator_pio_in_emulated(vcpu: Vcpu, pio: PioRequest, size: int, port: int, count: int) -> bytes | None:
    """X86EmulateOps.pio_in_emulated: the answer to an earlier request counts, whatever is asked now.

    If userspace has changed RCX in between, so many bytes are taken as RCX now says: some of the
    answer, or beyond it what the buffer still holds of earlier ones.
    """
    if not pio.count:
        return emulator_pio_in(vcpu, pio, size, port, count)
    data = complete_emulator_pio_in(vcpu, pio)
    pio.read_ahead[: len(data)] = data
    return bytes(pio.read_ahead[: size * count])


def emulator_pio_out(
    vcpu: Vcpu, pio: PioRequest, buses: IoBuses, size: int, port: int, data: bytes, count: int
) -> bool:
    """Write elements to a port: True if the bus took them.

    KVM deviation: if a later element finds no device, the rest is dropped (SDM Vol. 2B OUTS).
    """
    _trace_pio(vcpu, _WRITE, port, size, count, data)
    for i in range(count):
        if not buses.write(KVM_PIO_BUS, port, data[i * size : (i + 1) * size]):
            if i:
                break
            _to_userspace(vcpu, pio, size, port, data, count, False)
            return False
    return True


# -- IN and OUT without the emulator -------------------------------------------------------------


def kvm_fast_pio(vcpu: Vcpu, pio: PioRequest, buses: IoBuses, size: int, port: int, *, in_: bool) -> int:
    """IN or OUT with RAX: 1 if done and skipped, 0 for userspace."""
    if in_:
        _fast_pio_in(vcpu, pio, size, port)
        return 0
    data = (vcpu.regs[VCPU_REGS_RAX] & (1 << size * 8) - 1).to_bytes(size, "little")
    if emulator_pio_out(vcpu, pio, buses, size, port, data, 1):
        return kvm_skip_emulated_instruction(vcpu)
    if port == _SLOW_PORT and vcpu.options.has_quirk("out_7e_inc_rip"):
        # KVM deviation: RIP moves before userspace has seen the access (SDM Vol. 1 19.6).
        vcpu.complete_userspace_io = lambda _: _complete_out_0x7e(pio)
        kvm_skip_emulated_instruction(vcpu)
    else:
        pio.linear_rip = kvm_get_linear_rip(vcpu)
        vcpu.complete_userspace_io = lambda vcpu: _complete_fast_pio_out(vcpu, pio)
    return 0


def _complete_out_0x7e(pio: PioRequest) -> int:
    pio.count = 0
    return 1


def _complete_fast_pio_out(vcpu: Vcpu, pio: PioRequest) -> int:
    """Skip the OUT, unless userspace has moved RIP."""
    pio.count = 0
    if not kvm_is_linear_rip(vcpu, pio.linear_rip):
        return 1
    return kvm_skip_emulated_instruction(vcpu)


def _fast_pio_in(vcpu: Vcpu, pio: PioRequest, size: int, port: int) -> None:
    emulator_pio_in(vcpu, pio, size, port, 1)
    pio.linear_rip = kvm_get_linear_rip(vcpu)
    vcpu.complete_userspace_io = lambda vcpu: _complete_fast_pio_in(vcpu, pio)


def _complete_fast_pio_in(vcpu: Vcpu, pio: PioRequest) -> int:
    """Take userspace's answer: less than 4 bytes merge into RAX, 4 zero-extend."""
    if not kvm_is_linear_rip(vcpu, pio.linear_rip):
        pio.count = 0
        return 1
    size = pio.size
    value = int.from_bytes(complete_emulator_pio_in(vcpu, pio), "little")
    if size < 4:
        mask = (1 << size * 8) - 1
        value |= vcpu.regs[VCPU_REGS_RAX] & ~mask & _MASK64
    vcpu.regs[VCPU_REGS_RAX] = value
    return kvm_skip_emulated_instruction(vcpu)
