"""Control registers in the Unicorn oracle: the guest sees its own, whatever serves the hidden page tables."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.model import NO_MEMORY
from emufuzz.oracle.unicorn.hidden import hidden_access

RAX, RCX, RDX = 0, 1, 2
HLT = "f4"
BREAKPOINTS = (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x401)


@pytest.mark.parametrize(
    ("code", "register"), [("0f20c0", "cr0"), ("0f20d0", "cr2"), ("0f20d8", "cr3"), ("0f20e0", "cr4")]
)
@pytest.mark.parametrize("mode", ["real", "prot16", "prot32", "compat32", "prot64"])
def test_reads_give_the_value_of_the_case(oracle, case, mode, code, register):
    built = case(mode, code + HLT, cr2=0x1234, cr3=0x5000)
    (outcome,) = oracle.run([built])
    assert outcome.gpr[RAX] == getattr(built.system, register)


def test_smsw_shows_no_hidden_bit(oracle, case):
    real, long = case("real", "0f01e0" + HLT), case("prot64", "0f01e0" + HLT)
    assert [outcome.gpr[RAX] for outcome in oracle.run([real, long])] == [0x10, 0x80000011]


@pytest.mark.parametrize(
    ("code", "register", "value"),
    [("0f22c0", "cr0", 0x33), ("0f22d0", "cr2", 0x1234), ("0f22d8", "cr3", 0x7000), ("0f22e0", "cr4", 0x210)],
)
@pytest.mark.parametrize("flags", [2, 0x102])
def test_writes_end_in_the_value_that_was_written(oracle, case, code, register, value, flags):
    built = case("prot32", code + HLT, {RAX: value}, rflags=flags)
    (outcome,) = oracle.run([built])
    expected = msgspec.structs.replace(built.system, **{register: value})
    assert (outcome.system, outcome.exception, outcome.rflags) == (expected, None, flags)


def test_a_write_of_what_the_hidden_tables_need_is_seen(oracle, case):
    """PG and WP are set for the hidden tables anyway."""
    built = case("real", "0f22c0" + HLT, {RAX: 0x80010011})
    assert oracle.run([built])[0].system.cr0 == 0x80010011


@pytest.mark.parametrize(("value", "after"), [(0x501, 0x501), (0xD01, 0xD01)])
def test_efer_is_read_and_written_whole(oracle, case, value, after):
    read = case("prot64", "0f32" + HLT, {RCX: 0xC0000080})
    write = case("prot64", "0f30" + HLT, {RCX: 0xC0000080, RAX: value}, efer=0x500)
    seen, written = oracle.run([read, msgspec.structs.replace(write, rip=write.rip + 64)])
    assert (seen.gpr[RAX], written.system.efer) == (0x500, after)


@pytest.mark.parametrize("flags", [2, 0x102])
def test_debug_registers_are_written(oracle, case, flags):
    cases = [
        case("prot64", "0f23c8" + HLT, {RAX: 0x1234}, rflags=flags),
        case("prot64", "0f23f0" + HLT, {RAX: 0xF}, rflags=flags, rip=0x6040),
        case("prot64", "0f23f8" + HLT, {RAX: 0xFF0000}, rflags=flags, rip=0x6080),
    ]
    first, status, control = oracle.run(cases)
    assert (first.system.dr[1], status.system.dr[6], control.system.dr[7]) == (0x1234, 0xFFFF0FFF, 0xFF0400)
    assert {outcome.rflags for outcome in (first, status, control)} == {flags}


def test_breakpoints_are_never_set_nor_taken_back(oracle, case):
    sets = case("prot64", "0f23f8" + HLT, {RAX: 0x401})
    moves = case("prot64", "0f23c0" + HLT, {RAX: 0x8000}, dr=BREAKPOINTS)
    for outcome in oracle.run([sets, moves]):
        assert outcome.unchecked == (("all", "unicorn-breakpoints"),)
    (refused,) = oracle.run([case("prot64", "0f23f8" + HLT, {RAX: 0x401}, cpl=3)])
    assert refused.exception == (13, 0, None)


def test_xcr0_is_that_of_the_case(oracle, case):
    osxsave = 0x6A0 | 1 << 18
    read = case("prot64", "0f01d0" + HLT, {RAX: 9, RDX: 9}, cr4=osxsave, xcr0=7)
    write = case("prot64", "0f01d1" + HLT, {RAX: 3}, cr4=osxsave, xcr0=7, rip=0x6040)
    seen, written = oracle.run([read, write])
    assert (seen.gpr[RAX], seen.gpr[RDX], written.system.xcr0) == (7, 0, 3)


def test_ports_float(oracle, case):
    (byte, word, string) = oracle.run(
        [
            case("prot32", "ec" + HLT, {RAX: 0x11111111}),
            case("prot32", "66ed" + HLT, {RAX: 0x11111111}, rip=0x6040),
            case("prot32", "6d" + HLT, {7: 0x8000}, rip=0x6080),
        ]
    )
    assert (byte.gpr[RAX], word.gpr[RAX]) == (0x111111FF, 0x1111FFFF)
    assert string.pages[8][:5] == b"\xff\xff\xff\xff\x04"


def test_devices_do_not_change_what_is_seen(oracle, case):
    devices = {"devices": [{"kind": "mmio", "addr": "0x9000", "size": 8}]}
    codes = ("0f20c0", "0f22d0", "0f23f0")
    cases = [msgspec.structs.replace(case("prot32", code + HLT, {RAX: 3}), extra=devices) for code in codes]
    read, address, status = oracle.run(cases)
    assert (read.gpr[RAX], address.system.cr2, status.system.dr[6]) == (0x80000011, 3, 0xFFFF0FF3)


def test_physical_memory_has_its_own_registers(oracle, case):
    directory = b"".join((n << 22 | 0x83).to_bytes(4, "little") for n in range(4))
    phys = {"phys": [{"addr": "0x1000", "data": directory.hex()}, {"addr": "0x6000"}]}
    built = case("prot32", "0f20d8" + HLT, cr3=0x1000, cr4=0x10)
    (outcome,) = oracle.run([msgspec.structs.replace(built, mem=NO_MEMORY, extra=phys)])
    assert (outcome.gpr[RAX], outcome.rip) == (0x1000, 0x6003)


@pytest.mark.parametrize("code", ["8906", "0f01e8", "0f20c8", "0f0101", "0f", "0f22", "f00f"])
def test_other_instructions_are_not_looked_at(case, code):
    assert hidden_access(case("prot32", code)) is None
