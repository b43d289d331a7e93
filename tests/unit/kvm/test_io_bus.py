"""In-kernel devices: which writes an eventfd takes, and what the local APIC's page answers."""

from __future__ import annotations

from typing import Any

import pytest
from support.exits import Exited

from emufuzz.kvm.io_bus import (
    KVM_FAST_MMIO_BUS,
    KVM_MMIO_BUS,
    KVM_PIO_BUS,
    IoBuses,
    Ioeventfd,
    vcpu_mmio_read,
    vcpu_mmio_write,
)
from emufuzz.kvm.trace import Trace

APIC = 0xFEE00000


@pytest.mark.parametrize(
    ("fd", "addr", "data", "taken"),
    [
        (Ioeventfd(0x1000), 0x1000, b"\1", True),
        (Ioeventfd(0x1000), 0x1000, bytes(8), True),
        (Ioeventfd(0x1000), 0x1000, b"", True),
        (Ioeventfd(0x1000), 0x1001, b"\1", False),
        (Ioeventfd(0x1000, 4), 0x1000, bytes(4), True),
        (Ioeventfd(0x1000, 4), 0x1000, bytes(2), False),
        (Ioeventfd(0x1000, 4), 0x1000, b"", False),
        (Ioeventfd(0x1000, 4, 5), 0x1000, b"\5\0\0\0", True),
        (Ioeventfd(0x1000, 4, 5), 0x1000, b"\6\0\0\0", False),
        (Ioeventfd(0x1000, 4, 0), 0x1000, bytes(4), True),
        (Ioeventfd(0x1000, 4, 0), 0x1000, b"\1\0\0\0", False),
    ],
)
def test_which_writes_an_eventfd_takes(fd: Ioeventfd, addr: int, data: bytes, taken: bool) -> None:
    assert fd.matches(addr, data) is taken


@pytest.mark.parametrize(
    ("declared", "buses"),
    [
        ({"addr": 0x1000}, {KVM_MMIO_BUS, KVM_FAST_MMIO_BUS}),
        ({"addr": 0x1000, "len": 0}, {KVM_MMIO_BUS, KVM_FAST_MMIO_BUS}),
        ({"addr": 0x1000, "len": 1}, {KVM_MMIO_BUS}),
        ({"addr": 0x1000, "port": True}, {KVM_PIO_BUS}),
    ],
)
def test_the_bus_of_an_eventfd(declared: dict[str, Any], buses: set[str]) -> None:
    found = IoBuses([declared])
    assert {
        bus for bus in (KVM_MMIO_BUS, KVM_PIO_BUS, KVM_FAST_MMIO_BUS) if found.write(bus, 0x1000, b"\1")
    } == buses
    assert not any(IoBuses().write(bus, 0x1000, b"\1") for bus in buses)


@pytest.mark.parametrize(
    ("addrs", "size", "handled"),
    [((), 4, 0), ((0x1000,), 4, 4), ((0x1000,), 16, 8), ((0x1000, 0x1008), 16, 16), ((0x1008,), 16, 0)],
)
def test_writes_go_to_the_bus_in_pieces_until_one_is_refused(
    addrs: tuple[int, ...], size: int, handled: int
) -> None:
    vcpu = Exited().vcpu
    assert vcpu_mmio_write(vcpu, IoBuses({"addr": addr} for addr in addrs), 0x1000, bytes(size)) == handled


def test_without_an_apic_nothing_can_be_read() -> None:
    assert vcpu_mmio_read(Exited().vcpu, APIC + 0x30, 4) == b""


def test_the_apics_page() -> None:
    vcpu = Exited(knobs={"irqchip": True}, kvm={"lapic": {0xF0: 0x1FF}}).vcpu
    vcpu.trace = Trace()
    version = vcpu_mmio_read(vcpu, APIC + 0x30, 4)
    assert version[0] == 0x14
    reads = [event.fields for event in vcpu.trace.events if event.name == "kvm_mmio"]
    assert reads == [{"type": "read", "len": 4, "gpa": APIC + 0x30, "val": int.from_bytes(version, "little")}]
    assert vcpu_mmio_read(vcpu, APIC + 0x1000, 4) == b""
    assert vcpu_mmio_write(vcpu, IoBuses(), APIC + 0x80, b"\x20\0\0\0") == 4
    assert vcpu_mmio_read(vcpu, APIC + 0x80, 4) == b"\x20\0\0\0"
    assert vcpu_mmio_write(vcpu, IoBuses(), APIC + 0x1000, b"\x20\0\0\0") == 0
