"""Decoding: effective addresses of every ModRM and SIB byte, prefixes, sizes, the fetch window."""

from __future__ import annotations

import pytest
from support.emulate import GP, PF, run, segment
from support.machine import machine

from emufuzz.arch.regs import GPR_NAMES
from emufuzz.case.build import CODE_BASE, DATA_BASE
from emufuzz.emulator.x86emul import EMULATION_FAILED, EMULATION_OK

REGS = {name: 0x1111_0000_0000_1000 * (i + 1) & (1 << 64) - 1 | i << 4 for i, name in enumerate(GPR_NAMES)}
BASES16 = ("rbx rsi", "rbx rdi", "rbp rsi", "rbp rdi", "rsi", "rdi", "rbp", "rbx")
DISP = b"\xf0\xde\xbc\x9a"
SS, DS = 2, 3


def lea(mode: str, code: bytes) -> tuple[int, int, int]:
    """(effective address, default segment, length) of the operand of LEA with these bytes."""
    m = machine(mode, code.hex(), **REGS)
    assert m.decode() == EMULATION_OK
    return m.ctxt.src.ea, m.ctxt.src.seg, m.ctxt.fetch_pos


def address16(mod: int, rm: int) -> tuple[int, int, int]:
    """Address, default segment and bytes of displacement (SDM Vol. 2A Table 2-1)."""
    if mod == 0 and rm == 6:
        return 0xDEF0, DS, 2
    names = BASES16[rm].split()
    disp = {0: 0, 1: -0x10, 2: 0xDEF0}[mod]
    ea = sum(REGS[name] for name in names) + disp
    return ea & 0xFFFF, SS if "rbp" in names else DS, mod


@pytest.mark.parametrize("mod", range(3))
def test_16_bit_addresses(mod):
    for rm in range(8):
        expected = address16(mod, rm)
        ea, seg, length = lea("prot16", bytes((0x8D, mod << 6 | rm)) + DISP)
        assert (ea, seg, length - 2) == expected, rm


def sib_address(mod: int, sib: int, rex: int, mask: int) -> tuple[int, int, int]:
    """As address16, for a SIB byte (SDM Vol. 2A Table 2-3)."""
    base, index = sib & 7 | (rex & 1) << 3, sib >> 3 & 7 | (rex & 2) << 2
    size = {0: 0, 1: 1, 2: 4}[mod]
    seg = SS if base in (4, 5) else DS
    ea = REGS[GPR_NAMES[base]]
    if base & 7 == 5 and mod == 0:
        ea, size, seg = 0, 4, DS
    ea += {0: 0, 1: -0x10, 4: -0x65432110}[size]
    if index != 4:
        ea += REGS[GPR_NAMES[index]] << (sib >> 6)
    return ea & mask, seg, size


@pytest.mark.parametrize("mod", range(3))
@pytest.mark.parametrize("rex", [0x40, 0x41, 0x42, 0x43])
def test_64_bit_sib_addresses(rex, mod):
    for sib in range(256):
        expected = sib_address(mod, sib, rex, (1 << 64) - 1)
        ea, seg, length = lea("prot64", bytes((rex | 8, 0x8D, mod << 6 | 4, sib)) + DISP)
        assert (ea, seg, length - 4) == expected, hex(sib)


@pytest.mark.parametrize("mod", range(3))
def test_32_bit_sib_addresses(mod):
    for sib in range(256):
        expected = sib_address(mod, sib, 0, 0xFFFFFFFF)
        ea, seg, length = lea("prot32", bytes((0x8D, mod << 6 | 4, sib)) + DISP)
        assert (ea, seg, length - 3) == expected, hex(sib)


@pytest.mark.parametrize("mod", range(3))
@pytest.mark.parametrize("rex", [0x48, 0x49])
def test_64_bit_addresses_without_sib(rex, mod):
    for rm in (0, 1, 2, 3, 5, 6, 7):
        reg = rm | (rex & 1) << 3
        size = {0: 0, 1: 1, 2: 4}[mod]
        ea, seg = REGS[GPR_NAMES[reg]], SS if reg == 5 else DS
        if mod == 0 and rm == 5:  # relative to the next instruction, whatever REX.B says
            size, ea, seg = 4, CODE_BASE + 3 + 4, DS
        ea += {0: 0, 1: -0x10, 4: -0x65432110}[size]
        assert lea("prot64", bytes((rex, 0x8D, mod << 6 | rm)) + DISP) == (ea & (1 << 64) - 1, seg, 3 + size)


def test_rip_relative_operands_count_the_immediate():
    done = run("prot64", "c7050010000078563412")
    assert done.events == [("write", CODE_BASE + 10 + 0x1000, b"\x78\x56\x34\x12")]
    cut = run("prot64", "678b0500200000")
    assert cut.events == [("read", CODE_BASE + 7 + 0x2000, 4)]


@pytest.mark.parametrize(
    ("mode", "code", "rax"),
    [
        ("prot64", "48b88877665544332211", 0x1122334455667788),
        ("prot64", "b888776655", 0x55667788),
        ("prot64", "66b88877", 0xAAAAAAAA_AAAA7788),
        ("prot64", "6648b88877665544332211", 0x1122334455667788),  # REX.W beats 66
        ("prot64", "4866b88877", 0xAAAAAAAA_AAAA7788),  # a legacy prefix makes REX void
        ("prot64", "4840b888776655", 0x55667788),  # the last REX counts
        ("prot64", "48c7c0000000ff", 0xFFFFFFFF_FF000000),
        ("prot64", "b488", 0xAAAAAAAA_AAAA88AA),
        ("prot64", "40b488", 0xAAAAAAAA_AAAAAAAA),  # with REX it is SPL
        ("prot32", "66b88877", 0xAAAAAAAA_AAAA7788),
        ("prot16", "b88877", 0xAAAAAAAA_AAAA7788),
        ("prot16", "66b888776655", 0x55667788),
    ],
)
def test_sizes_and_prefixes(mode, code, rax):
    done = run(mode, code, rax=0xAAAAAAAA_AAAAAAAA)
    assert done.rc == "continue"
    assert done.reg("rax") == rax


def test_fifteen_bytes_are_the_limit():
    assert run("prot64", "66" * 14 + "90").rip == CODE_BASE + 15
    assert run("prot64", "66" * 15 + "90").fault == GP


def test_a_fetch_that_crosses_into_an_absent_page():
    done = run("prot64", "b801", rip=0x7FFE, data={})
    assert done.rc == "continue"  # the page behind holds zeros
    gone = run("prot64", "b801", rip=0xAFFE)
    assert gone.fault == (PF, 16, 0xB000)
    assert run("prot32", "b801", rip=0xAFFE, cpl=3).fault == (PF, 4, 0xB000)  # no NX: the I bit is clear
    short = run("prot64", "9090", rip=0xAFFE)
    assert short.rc == "continue"  # the absent page is not needed


def test_a_fetch_beyond_the_limit_of_cs():
    for limit, fault in ((CODE_BASE + 4, None), (CODE_BASE + 3, GP)):
        done = run("prot32", "b801020304", cs=segment("prot32", "cs", limit=limit, g=0))
        assert done.fault == fault
    unusable = run("prot32", "90", cs=segment("prot32", "cs", p=0))
    assert unusable.fault == GP


def test_a_fetch_from_where_no_ram_is_is_no_fault():
    m = machine("prot64", "90", {"op": "fetch", "result": "io_needed"})
    assert m.decode() == EMULATION_FAILED
    assert not m.ctxt.have_exception


def test_bit_offsets_reach_beyond_the_operand():
    for offset, at in ((35, 4), (-1, -4), (31, 0)):
        done = run("prot64", "0fa308", rax=DATA_BASE + 8, rcx=offset & (1 << 64) - 1)
        assert done.events == [("read", DATA_BASE + 8 + at, 4)]
    assert run("prot64", "0fba2023", rax=DATA_BASE).events == [
        ("read", DATA_BASE, 4)
    ]  # an immediate does not
