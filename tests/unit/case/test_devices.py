# ruff: noqa: E501 - one bad input per row reads best
from __future__ import annotations

import pytest

from emufuzz.case.devices import DeviceAccess, Devices, devices_of, trace_from_obj, trace_to_obj
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_json, case_from_obj, case_to_json


def mmio(addr=0x1000, size=4, **fields):
    return {"kind": "mmio", "addr": addr, "size": size} | fields


def pio(port=0x60, size=1, **fields):
    return {"kind": "pio", "port": port, "size": size} | fields


def test_a_stream_answers_reads_in_order_then_ones():
    devices = Devices([mmio(reads="010203")])
    assert [devices.mmio_read(0x1000, 2), devices.mmio_read(0x1002, 2), devices.mmio_read(0x1001, 1)] == [
        b"\x01\x02", b"\x03\xff", b"\xff",
    ]  # fmt: skip


def test_stream_is_the_default_and_keeps_no_writes():
    devices = Devices([mmio(reads="0102"), mmio(0x2000, behaviour="stream", reads="0102")])
    for base in (0x1000, 0x2000):
        devices.mmio_write(base, b"\xee")
        assert devices.mmio_read(base, 2) == b"\x01\x02"


def test_ram_starts_with_reads_then_zeros_and_keeps_writes():
    devices = Devices([mmio(size=8, behaviour="ram", reads="0a0b")])
    assert devices.mmio_read(0x1000, 4) == b"\x0a\x0b\0\0"
    devices.mmio_write(0x1001, b"\x11\x22")
    assert devices.mmio_read(0x1000, 8) == b"\x0a\x11\x22\0\0\0\0\0"


def test_float_reads_ones_whatever_was_written_or_declared():
    devices = Devices([mmio(behaviour="float", reads="00")])
    devices.mmio_write(0x1000, b"\0\0\0\0")
    assert devices.mmio_read(0x1000, 4) == b"\xff" * 4


def test_an_address_without_a_device_floats():
    devices = Devices([mmio()])
    devices.mmio_write(0x5000, b"\0")
    assert devices.mmio_read(0x5000, 8) == b"\xff" * 8
    assert Devices().mmio_read(2**64 - 1, 8) == b"\xff" * 8


@pytest.mark.parametrize(
    ("gpa", "size", "data"),
    [
        (0x0FFE, 4, b"\xff\xff\x01\x02"),
        (0x1002, 4, b"\x03\x04\xff\xff"),
        (0x0FFE, 8, b"\xff\xff\x01\x02\x03\x04\xff\xff"),
        (0x0FFF, 1, b"\xff"),
        (0x1004, 1, b"\xff"),
    ],
)
def test_bytes_beyond_the_ends_of_a_device_float(gpa, size, data):
    assert Devices([mmio(behaviour="ram", reads="01020304")]).mmio_read(gpa, size) == data


def test_a_write_reaches_each_device_it_touches_with_its_own_bytes():
    devices = Devices([mmio(0x1004, 2, behaviour="ram"), mmio(0x1000, 4, behaviour="ram")])
    devices.mmio_write(0x1002, b"\x01\x02\x03\x04\x05\x06")
    assert devices.mmio_read(0x1000, 8) == b"\0\0\x01\x02\x03\x04\xff\xff"


def test_only_the_bytes_inside_take_from_a_stream():
    devices = Devices([mmio(size=2, reads="01020304")])
    assert devices.mmio_read(0x0FFF, 2) == b"\xff\x01"
    assert devices.mmio_read(0x1000, 2) == b"\x02\x03"


def test_ranges_and_pages():
    devices = Devices([mmio(0x5FFF, 2), mmio(0x1000, 0x1000), pio()])
    assert devices.mmio_ranges() == [(0x1000, 0x2000), (0x5FFF, 0x6001)]
    assert devices.page_numbers() == {1, 5, 6}
    assert Devices().page_numbers() == frozenset()


def test_the_last_bytes_of_the_address_space():
    devices = Devices([mmio(2**64 - 4, behaviour="ram", reads="01020304"), pio(0xFFFF, reads="07")])
    assert devices.mmio_read(2**64 - 2, 4) == b"\x03\x04\xff\xff"
    assert devices.page_numbers() == {2**52 - 1}
    assert devices.pio_in(0xFFFF, 2) == b"\x07\xff"


def test_ports_without_a_device_share_port_in():
    devices = Devices([pio(0x60, reads="aa")], b"\x01\x02\x03")
    assert devices.pio_in(0x70, 1) == b"\x01"
    assert devices.pio_in(0x60, 1) == b"\xaa"
    assert devices.pio_in(0x71, 4) == b"\x02\x03\xff\xff"
    assert devices.pio_in(0x70, 2) == b"\xff\xff"


def test_the_first_port_decides_who_answers():
    devices = Devices([pio(0x60, 2, reads="0a0b0c")], b"\x01\x02")
    assert devices.pio_in(0x5F, 2) == b"\x01\x02"
    assert devices.pio_in(0x61, 4) == b"\x0a\xff\xff\xff"
    assert devices.pio_in(0x60, 2) == b"\x0b\x0c"


def test_each_element_of_a_string_access_is_one_access():
    devices = Devices([pio(size=2, behaviour="ram", reads="0102")])
    assert devices.pio_in(0x60, 2, 2) == b"\x01\x02\x01\x02"
    devices.pio_out(0x60, 2, b"\x11\x12\x13\x14")
    assert devices.pio_in(0x60, 1) == b"\x13"
    assert devices.pio_in(0x60, 1, 0) == b""
    assert devices.trace == [
        DeviceAccess("pio", 0x60, 2, write=False, data=b"\x01\x02"),
        DeviceAccess("pio", 0x60, 2, write=False, data=b"\x01\x02"),
        DeviceAccess("pio", 0x60, 2, write=True, data=b"\x11\x12"),
        DeviceAccess("pio", 0x60, 2, write=True, data=b"\x13\x14"),
        DeviceAccess("pio", 0x60, 1, write=False, data=b"\x13"),
    ]


def test_a_write_over_the_end_of_a_port_device_loses_the_rest():
    devices = Devices([pio(0x60, 2, behaviour="ram"), pio(0x62, 1, behaviour="ram")])
    devices.pio_out(0x61, 4, b"\x01\x02\x03\x04")
    assert (devices.pio_in(0x60, 2), devices.pio_in(0x62, 1)) == (b"\0\x01", b"\0")


def test_a_write_where_no_port_device_is_vanishes_but_is_traced():
    devices = Devices()
    devices.pio_out(0x80, 1, b"\x01")
    assert devices.trace == [DeviceAccess("pio", 0x80, 1, write=True, data=b"\x01")]


def test_trace_is_one_entry_per_access_and_round_trips():
    devices = Devices([mmio(reads="01"), mmio(0x1004, 4)])
    devices.mmio_read(0x1002, 4)
    devices.mmio_write(0x1000, b"\x05")
    devices.pio_in(0x60, 1)
    assert trace_to_obj(devices.trace) == [
        {"kind": "mmio", "addr": "0x1002", "size": 4, "direction": "read", "data": "01ffffff"},
        {"kind": "mmio", "addr": "0x1000", "size": 1, "direction": "write", "data": "05"},
        {"kind": "pio", "port": 96, "size": 1, "direction": "read", "data": "ff"},
    ]
    assert trace_from_obj(trace_to_obj(devices.trace)) == devices.trace


@pytest.mark.parametrize("size", [0, 9, -1])
def test_an_access_has_1_to_8_bytes(size):
    devices = Devices()
    for access in (
        lambda: devices.mmio_read(0, size),
        lambda: devices.mmio_write(0, bytes(max(size, 0))),
        lambda: devices.pio_in(0, size),
        lambda: devices.pio_out(0, size, b""),
    ):
        with pytest.raises(ValueError, match="not 1 to 8"):
            access()
    assert devices.trace == []


def test_a_string_write_is_whole_elements():
    with pytest.raises(ValueError, match="3 bytes are not a multiple of 2"):
        Devices().pio_out(0, 2, b"\0\0\0")


def test_devices_of_a_case_are_fresh_each_time():
    case = case_from_obj({"code": "ec", "port_in": "0102", "devices": [mmio("0x1000", reads="01")]})
    for _ in range(2):
        devices = devices_of(case)
        assert (devices.mmio_read(0x1000, 1), devices.pio_in(0x60, 2)) == (b"\x01", b"\x01\x02")
    assert devices_of(case_from_obj({"code": "ec"})).mmio_ranges() == []


BAD_DEVICES = {
    "mmio without addr": ([mmio(), {"kind": "mmio", "size": 1}], "devices[1].addr: missing"),
    "pio without port":  ([{"kind": "pio", "size": 1}], "devices[0].port: missing"),
    "mmio with port":    ([mmio(port=1)], "devices[0].port: a device of kind mmio has none"),
    "pio with addr":     ([pio(addr=1)], "devices[0].addr: a device of kind pio has none"),
    "no size":           ([{"kind": "mmio", "addr": 0}], "devices[0].size: missing"),
    "size 0":            ([mmio(size=0)], "devices[0].size: 0 is out of range (min 1)"),
    "huge":              ([mmio(size=2**24 + 1)], "devices[0].size: 16777217 is out of range (max 0x1000000)"),
    "all huge":          ([mmio(0, 2**24), mmio(2**30, 1)], "devices: more than 16 MiB of MMIO"),
    "beyond the ports":  ([pio(0xFFFF, 2)], "devices[0].size: reaches beyond port 0xffff"),
    "port too large":    ([pio(0x10000)], "devices[0].port: 65536 is out of range"),
    "beyond memory":     ([mmio(2**64 - 3)], "devices[0].size: reaches beyond addr 0xffffffffffffffff"),
    "overlap":           ([mmio(0x1003), pio(), mmio(0x1000)], "devices[2].addr: overlaps devices[0]"),
    "ports overlap":     ([pio(0x60, 4), pio(0x63)], "devices[1].port: overlaps devices[0]"),
    "too much RAM":      ([mmio(behaviour="ram", reads="00" * 5)], "devices[0].reads: 5 bytes are more than the device's size of 4"),
    "unknown behaviour": ([mmio(behaviour="rom")], "devices[0].behaviour: 'rom' is unknown"),
    "odd digits":        ([mmio(reads="0")], "devices[0].reads: '0': odd number of digits"),
    "unknown field":     ([mmio(irq=1)], "devices[0].irq: unknown field"),
    "no list":           ({"kind": "mmio"}, "devices: expected an array, got an object"),
    "too many":          ([pio(port) for port in range(257)], "devices: 257 items are too many (max 256)"),
}  # fmt: skip


@pytest.mark.parametrize(("declared", "message"), BAD_DEVICES.values(), ids=BAD_DEVICES)
def test_bad_devices(declared, message):
    with pytest.raises(CaseError) as error:
        case_from_obj({"code": "90", "devices": declared})
    assert str(error.value).startswith(message)
    if isinstance(declared, list):
        with pytest.raises(CaseError) as error:
            Devices(declared)
        assert str(error.value).startswith(message)


def test_neighbours_and_a_port_at_an_address_do_not_overlap():
    declared = [mmio("0x60", 4), mmio("0x64", 4), pio("0x60", 4, behaviour="ram", reads="00000000")]
    case = case_from_obj({"code": "90", "devices": declared})
    assert case.extra == {"devices": declared}
    assert case_from_json(case_to_json(case)) == case


ACCESS = {"kind": "mmio", "addr": "0x10", "size": 1, "direction": "read", "data": "00"}
BAD_TRACES = {
    "no size":      ({"kind": "mmio", "addr": 0, "direction": "read", "data": ""}, "[0].size: missing"),
    "mmio in port": (ACCESS | {"port": 1}, "device_trace[0].port: an access of kind mmio has none"),
    "pio at addr":  (ACCESS | {"kind": "pio", "port": 1}, "device_trace[0].addr: an access of kind pio has none"),
    "pio nowhere":  ({"kind": "pio", "size": 1, "direction": "read", "data": "00"}, "device_trace[0].port: missing"),
    "wrong size":   (ACCESS | {"size": 2}, "device_trace[0].data: 1 bytes, but the size is 2"),
    "too long":     (ACCESS | {"size": 9}, "[0].size: 9 is out of range (max 0x8)"),
    "sideways":     (ACCESS | {"direction": "up"}, "[0].direction: 'up' is unknown"),
}  # fmt: skip


@pytest.mark.parametrize(("access", "message"), BAD_TRACES.values(), ids=BAD_TRACES)
def test_bad_traces(access, message):
    with pytest.raises(CaseError) as error:
        trace_from_obj([access])
    assert str(error.value).startswith(message)
