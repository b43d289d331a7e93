"""Quirks of segment loads, far transfers, system calls and port I/O; numbered as in docs/porting.md."""

from __future__ import annotations

import pytest
from support.emulate import GP, NP, PF, UD, descriptor, gdt_with, run, segment

from emufuzz.case.build import CODE_BASE, DATA_BASE, GDT_BASE, LDT_BASE, STACK_TOP
from emufuzz.case.model import Segment, TableRegister

SEL = 0x80
CALL_GATE32, TASK_GATE, TSS32, TSS16, TSS16_BUSY, LDT = 12, 5, 9, 1, 3, 2
CODE32 = {"s": 1, "d": 1, "g": 1, "limit": 0xFFFFF}
MSR_STAR, MSR_LSTAR, MSR_CSTAR, MSR_SFMASK = 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084
SYSENTER_CS = 0x174
TSS = 0x8000


def far(code: str, offset: int, selector: int = SEL) -> str:
    """A direct far transfer with a 32-bit offset."""
    return code + offset.to_bytes(4, "little").hex() + selector.to_bytes(2, "little").hex()


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        (mode, code)
        for mode in ("vm86", "prot16", "prot32", "compat32", "prot64")
        for code in ("cc", "cd20", "cf")
    ],
)
def test_quirk_24_interrupts_and_iret_outside_real_mode(mode, code):
    assert run(mode, code).rc == "unhandleable"


@pytest.mark.parametrize("kind", [CALL_GATE32, TASK_GATE, TSS32])
@pytest.mark.parametrize("code", ["9a", "ea"])
def test_quirk_25_gates_and_outer_returns_are_unhandleable(code, kind):
    done = run("prot32", far(code, CODE_BASE), **gdt_with({SEL: descriptor(kind)}))
    assert (done.rc, done.fault) == ("unhandleable", None)
    outer = {STACK_TOP: CODE_BASE.to_bytes(4, "little") + (SEL | 3).to_bytes(4, "little")}
    slots = gdt_with({SEL: descriptor(0xB, dpl=3, **CODE32)})
    slots["data"] |= outer
    assert run("prot32", "cb", **slots).rc == "unhandleable"


@pytest.mark.parametrize("code", ["ea", "cb"])
def test_quirk_26_a_bad_offset_leaves_cs_replaced(code):
    slots = gdt_with({SEL: descriptor(0xB, s=1, d=1, limit=0xFF)})
    slots["data"][STACK_TOP] = CODE_BASE.to_bytes(4, "little") + SEL.to_bytes(4, "little")
    done = run("prot32", far("ea", CODE_BASE) if code == "ea" else code, **slots)
    assert (done.rc, done.fault) == ("unhandleable", None)
    assert done.seg("cs").sel == SEL
    assert done.rip == CODE_BASE


def test_quirk_27_a_failed_far_call_restores_cs_without_high_base():
    cs = segment("prot64", "cs", base=0x12345678_00000000)
    done = run("prot64", "ff18", rax=DATA_BASE, rsp=0xC004, cs=cs, **_far_pointer())
    assert done.fault == (PF, 2, 0xBFFC)
    assert (done.seg("cs").sel, done.seg("cs").base) == (cs.sel, 0)
    assert done.mem(0xC000, 4) == cs.sel  # pushed before the fault
    assert done.events[-1] == ("set_segment", 1, cs.sel)


def _far_pointer() -> dict:
    slots = gdt_with({SEL: descriptor(0xB, s=1, l=1, g=1)})
    slots["data"][DATA_BASE] = CODE_BASE.to_bytes(4, "little") + SEL.to_bytes(2, "little")
    return slots


def test_quirk_28_syscall_from_compatibility_mode_cuts_cstar():
    msr = ((MSR_STAR, 0x10_00000000), (MSR_LSTAR, 1), (MSR_CSTAR, 0xFFFF8000_00001234), (MSR_SFMASK, 0))
    done = run("compat32", "0f05", vendor="amd", msr=msr)
    assert (done.rc, done.rip) == ("continue", 0x1234)
    assert run("compat32", "0f05", msr=msr).fault == UD  # Intel
    full = run("prot64", "0f05", msr=((MSR_LSTAR, 0xFFFF8000_00001234), (MSR_STAR, 0x10_00000000)))
    assert full.rip == 0xFFFF8000_00001234


def test_quirk_29_sysenter_and_sysexit():
    assert run("prot64", "0f34").rc == "unhandleable"
    null = ((SYSENTER_CS, 3),)
    assert run("prot64", "480f35", rcx=0x1000, rdx=0x2000, msr=null).rip == 0x2000
    assert run("prot64", "0f35", rcx=0x1000, rdx=0x2000, msr=null).fault == GP
    assert run("prot64", "480f35", msr=((SYSENTER_CS, 0),)).fault == GP


def test_quirk_37_ltr_takes_a_16_bit_tss_in_long_mode():
    slots = gdt_with({SEL: descriptor(TSS16, base=TSS) + b"\0\0\0\0\xff\xff\xff\xff"})  # upper type field set
    done = run("prot64", "0f00d8", rax=SEL, **slots)
    assert (done.rc, done.seg("tr").type) == ("continue", TSS16_BUSY)
    slots["gdtr"] = TableRegister(GDT_BASE, SEL + 7)  # the upper half lies beyond the limit
    assert run("prot64", "0f00d8", rax=SEL, **slots).rc == "continue"


def test_quirk_38_the_limit_of_an_ldt_has_16_bits():
    ldt = Segment(0x70, LDT_BASE, 0x1000F, LDT, p=1)
    data = {LDT_BASE + 0x10: descriptor(3, s=1)}
    assert run("prot32", "8ed8", rax=0x14, ldtr=ldt, data=data).fault == (13, 0x14, None)
    wide = Segment(0x70, LDT_BASE, 0x10017, LDT, p=1)
    assert run("prot32", "8ed8", rax=0x14, ldtr=wide, data=data).rc == "continue"


def test_quirk_39_the_accessed_bit_is_a_plain_eight_byte_store():
    done = run("prot32", "8ed8", rax=SEL, **gdt_with({SEL: descriptor(2, s=1)}))
    assert done.events == [
        ("read", GDT_BASE + SEL, 8, "sys"),
        ("write", GDT_BASE + SEL, descriptor(3, s=1), "sys"),
        ("set_segment", 3, SEL),
    ]


def io_tss(bitmap_at: int, bits: bytes, limit: int) -> dict:
    tss = bytes(102) + bitmap_at.to_bytes(2, "little")
    return {"tr": Segment(0x50, TSS, limit, 11, p=1), "data": {TSS: tss, TSS + bitmap_at: bits}}


def test_quirk_45_the_io_bitmap():
    allowed = io_tss(104, bytes(2), limit=104)
    assert run("prot32", "e507", cpl=3, **allowed).rc == "continue"  # ports 7..Ah, the limit ends at 7
    assert run("prot32", "e508", cpl=3, **allowed).fault == GP
    absent = io_tss(0x3000, b"", limit=0x5000)
    del absent["data"][TSS + 0x3000]
    assert run("prot32", "e507", cpl=3, **absent).fault == GP  # not #PF
    short = io_tss(104, bytes(2), limit=102)
    assert run("prot32", "e507", cpl=3, **short).fault == GP


def test_quirk_46_rep_in_reads_ahead():
    done = run("prot32", "f3ec", rcx=5, rdx=0x70, rdi=0, port_in=bytes(range(9)))
    assert done.events == [("in", 0x70, 1, 5)]
    assert done.reg("rax") == 0
    edge = run("prot32", "f3ed", rcx=5, rdx=0x70, rdi=0xFFD)  # 3 bytes to the end of the page: 3 elements
    assert edge.events == [("in", 0x70, 4, 3)]


def test_quirk_48_rep_ins_reads_the_port_first():
    done = run("prot32", "f36c", rcx=4, rdx=0x70, rdi=0xB000)
    assert done.events == [("in", 0x70, 1, 4), ("write", 0xB000, b"\xff" * 4)]
    assert done.fault == (PF, 2, 0xB000)


def test_quirk_58_out_does_not_wait_for_userspace():
    done = run("prot64", "48ef", rax=0x1122334455667788, rdx=0x70, callbacks=[
        {"op": "pio_out_emulated", "result": "io_needed"}])  # fmt: skip
    assert (done.rc, done.rip) == ("continue", CODE_BASE + 2)
    assert done.events == [("out", 0x70, b"\x88\x77\x66\x55")]


def test_quirk_23_iret_checks_against_64k_and_unmasks_nmi():
    frame = {STACK_TOP: b"\x00\x90\x00\x00\x02\x00"}
    done = run("real", "cf", data=frame, cs=segment("real", "cs", limit=0x6FFF))
    assert (done.rc, done.rip) == ("continue", 0x9000)  # beyond the limit of CS
    assert done.events[-1] == ("set_nmi_mask", 0)
    assert run("real", "66cf", data={STACK_TOP: b"\x00\x00\x01\x00"}).fault == GP


def test_loads_that_segment_checks_refuse():
    for kind, fields, fault in (
        (2, {"s": 1, "p": 0}, (NP, SEL, None)),
        (8, {"s": 1}, (13, SEL, None)),
        (2, {}, (13, SEL, None)),
    ):
        assert run("prot32", "8ed8", rax=SEL, **gdt_with({SEL: descriptor(kind, **fields)})).fault == fault
    assert run("prot32", "8ed0", rax=SEL, **gdt_with({SEL: descriptor(3, s=1, p=0)})).fault == (12, SEL, None)
    assert run("prot64", "8ed0", rax=3, cpl=3).fault == GP
    assert run("prot64", "8ed0", rax=0).seg("ss").p == 1  # the null selector in 64-bit mode
