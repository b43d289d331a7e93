"""Hardware task switches: state saved and loaded, every reason, a fault at every step."""

from __future__ import annotations

from struct import pack, unpack
from typing import NamedTuple

import msgspec
import pytest
from support.emulate import descriptor
from support.machine import Machine, machine

from emufuzz.arch.cr import X86_CR0_TS
from emufuzz.arch.rflags import X86_EFLAGS_NT, X86_EFLAGS_VM
from emufuzz.case.build import GDT_BASE, IDT_BASE, build_system
from emufuzz.case.model import Segment, TableRegister
from emufuzz.emulator.task import (
    TASK_SWITCH_CALL,
    TASK_SWITCH_GATE,
    TASK_SWITCH_IRET,
    TASK_SWITCH_JMP,
    emulator_task_switch,
)
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_OK,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_VM86,
    X86EMUL_NAMES,
    X86EMUL_PROPAGATE_FAULT,
)

REASONS = {
    "call": TASK_SWITCH_CALL,
    "iret": TASK_SWITCH_IRET,
    "jmp": TASK_SWITCH_JMP,
    "gate": TASK_SWITCH_GATE,
}
NEW, OLD, LDT = 0x80, 0x88, 0x90
NEW_TSS, OLD_TSS = 0x8000, 0x9000
CODE, DATA = 0x08, 0x28
GPRS = tuple(range(0x101, 0x109))
NEW_EIP, NEW_STACK = 0x6100, 0xC400
BUSY = 2


class Tss(NamedTuple):
    """The fields of a new TSS that matter."""

    flags: int = 0x202
    cs: int = CODE
    ss: int = DATA
    es: int = DATA
    ds: int = DATA
    ldt: int = LDT
    fs: int = 0
    gs: int = 0
    cr3: int = 0x100000

    def pack(self, bits: int) -> bytes:
        gprs = [*GPRS[:4], NEW_STACK, *GPRS[5:]]
        if bits == 16:
            words = [
                0xBEEF,
                *[0] * 6,
                NEW_EIP,
                self.flags,
                *gprs,
                self.es,
                self.cs,
                self.ss,
                self.ds,
                self.ldt,
            ]
            return pack("<22H", *words)
        segs = [self.es, self.cs, self.ss, self.ds, self.fs, self.gs]
        return pack("<26I", 0xDEADBEEF, *[0] * 6, self.cr3, NEW_EIP, self.flags, *gprs, *segs, self.ldt, 0)


def tss_descriptor(bits: int, base: int, busy: bool, **fields: int) -> bytes:
    kind = (9 if bits == 32 else 1) | (BUSY if busy else 0)
    return descriptor(kind, base=base, limit=0x67 if bits == 32 else 0x2B, **fields)


def task(
    bits: int,
    *scripts: dict,
    tss: Tss | None = None,
    new: bytes | None = None,
    reason: str = "call",
    **kwargs,
) -> Machine:
    """A machine about to leave a busy task for another one, in 32-bit protected mode."""
    mode = kwargs.pop("mode", "prot32")
    new = new or tss_descriptor(bits, NEW_TSS, busy=reason == "iret")
    old = tss_descriptor(bits, OLD_TSS, busy=True)
    flat = {"s": 1, "d": 1, "g": 1, "limit": 0xFFFFF}
    slots = {NEW: new, OLD: old, LDT: descriptor(2, base=0x2000, limit=0x7F)}
    slots |= {CODE: descriptor(0xB, **flat), DATA: descriptor(3, **flat)}
    data = {GDT_BASE + selector: value for selector, value in slots.items()}
    data |= {
        NEW_TSS: (tss or Tss()).pack(bits),
        OLD_TSS: bytes(0x68),
        IDT_BASE + 0x80 * 8: descriptor(5, dpl=0),
    }
    system = build_system(mode)
    seg = (*system.seg[:6], Segment(OLD, OLD_TSS, 0x67, 11 if bits == 32 else 3, p=1), system.seg[7])
    system = msgspec.structs.replace(
        system,
        seg=seg,
        gdtr=TableRegister(GDT_BASE, 0xFFF),
        dr=(*system.dr[:7], 0x7FF),
        **kwargs.pop("state", {}),
    )
    return machine(mode, "90", *scripts, system=system, data=data, rax=0xA0, rdi=0xA7, **kwargs)


def switch(m: Machine, reason: str, idt_index: int = -1, error_code: int | None = None) -> int:
    return emulator_task_switch(m.ctxt, NEW, idt_index, REASONS[reason], error_code)


@pytest.mark.parametrize("reason", REASONS)
def test_32_bit_task(reason):
    m = task(32, reason=reason, flags=X86_EFLAGS_NT)
    assert switch(m, reason) == EMULATION_OK
    ctxt = m.ctxt
    assert ctxt.rc == X86EMUL_CONTINUE
    assert ctxt.eip == NEW_EIP
    nested = reason in ("call", "gate")
    assert ctxt.eflags == 0x202 | (X86_EFLAGS_NT if nested else 0)
    assert m.ops.gpr[:8] == [*GPRS[:4], NEW_STACK, *GPRS[5:]]
    old = unpack("<26I", m.read(OLD_TSS, 104))
    assert old[7:10] == (0, 0x6000, 2 | (0 if reason == "iret" else X86_EFLAGS_NT))
    assert (old[10], old[17]) == (0xA0, 0xA7)
    assert old[18:25] == (DATA, CODE, DATA, DATA, DATA, DATA, 0)  # the LDT selector is not saved
    assert m.read(NEW_TSS, 4) == (pack("<I", OLD) if nested else pack("<I", 0xDEADBEEF))
    assert_new_state(m, reason)


def assert_new_state(m: Machine, reason: str) -> None:
    """Busy bits, TR, CR0.TS and DR7, which both kinds of TSS have in common."""
    nested = reason in ("call", "gate")
    assert m.system.seg[6].sel == NEW
    assert m.system.seg[6].type & BUSY
    assert bool(m.read(GDT_BASE + NEW + 5, 1)[0] & BUSY)
    assert bool(m.read(GDT_BASE + OLD + 5, 1)[0] & BUSY) == nested
    assert m.system.seg[7].sel == LDT
    assert m.system.cr0 & X86_CR0_TS
    assert m.system.dr[7] & 0x1FF == 0xAA  # global enables stay, local ones and LE go


@pytest.mark.parametrize("reason", REASONS)
def test_16_bit_task(reason):
    m = task(16, reason=reason)
    mode = m.ctxt.mode
    assert switch(m, reason) == EMULATION_OK
    assert m.ctxt.eip == NEW_EIP
    assert m.ctxt.mode == mode
    old = unpack("<22H", m.read(OLD_TSS, 44))
    assert old[7:10] == (0x6000, 2, 0xA0)
    assert old[17:22] == (DATA, CODE, DATA, DATA, m.case.system.seg[7].sel)  # here LDTR is saved
    nested = reason in ("call", "gate")
    assert m.read(NEW_TSS, 2) == (pack("<H", OLD) if nested else b"\xef\xbe")
    assert m.ops.gpr[:8] == [*GPRS[:4], NEW_STACK, *GPRS[5:]]
    assert_new_state(m, reason)


def test_the_old_flags_are_saved_without_nt_on_iret():
    m = task(32, reason="iret", flags=X86_EFLAGS_NT)
    switch(m, "iret")
    assert unpack("<I", m.read(OLD_TSS + 36, 4))[0] == 2


def test_a_task_in_virtual_8086_mode():
    m = task(32, tss=Tss(flags=0x202 | X86_EFLAGS_VM, cs=0x600, ss=0xC00, es=0x800, ds=0x801, ldt=0))
    assert switch(m, "jmp") == EMULATION_OK
    assert m.ctxt.mode == X86EMUL_MODE_VM86
    assert [seg.base for seg in m.system.seg[:4]] == [0x8000, 0x6000, 0xC000, 0x8010]
    assert all((seg.dpl, seg.limit, seg.type) == (3, 0xFFFF, 3) for seg in m.system.seg[:6])


def test_from_virtual_8086_mode_to_protected_mode():
    m = task(32, mode="vm86")
    assert switch(m, "gate") == EMULATION_OK
    assert m.ctxt.mode == X86EMUL_MODE_PROT32
    assert m.system.seg[1].dpl == 0


@pytest.mark.parametrize(("bits", "size"), [(32, 4), (16, 2)])
def test_error_code(bits, size):
    m = task(bits)
    assert switch(m, "gate", error_code=0x1234) == EMULATION_OK
    assert m.ops.gpr[4] == NEW_STACK - size
    assert m.read(NEW_STACK - size, size) == (0x1234).to_bytes(size, "little")


def test_error_code_that_cannot_be_pushed():
    m = task(32, {"op": "write_emulated", "result": "propagate_fault"})
    assert switch(m, "gate", error_code=1) == EMULATION_OK
    assert m.ctxt.rc == X86EMUL_PROPAGATE_FAULT
    assert m.ctxt.eip == 0x6000
    assert m.system.dr[7] & 0x1FF == 0xAA  # DR7 is changed all the same


@pytest.mark.parametrize(
    ("index", "selector", "cpl", "fault"),
    [(0x80, NEW, 0, None), (0x80, NEW | 1, 0, 0x402), (0x80, NEW, 3, 0x402), (0x3FF, NEW, 0, 0x1FFA)],
)
def test_gates_are_checked_for_software_interrupts(index, selector, cpl, fault):
    m = task(32)
    m.ops.cpl_value = cpl
    m.ops.system = msgspec.structs.replace(m.system, idtr=TableRegister(IDT_BASE, 0x407))
    assert emulator_task_switch(m.ctxt, selector, index, TASK_SWITCH_GATE, None) == EMULATION_OK
    if fault is None:
        assert m.ctxt.rc == X86EMUL_CONTINUE
    else:
        assert (m.ctxt.rc, m.fault[:2]) == (X86EMUL_PROPAGATE_FAULT, (13, fault))


def test_a_gate_that_cannot_be_read():
    m = task(32, {"op": "read_std", "nth": 3, "result": "propagate_fault"})
    switch(m, "gate", idt_index=0x80)
    assert m.fault[0] == 14
    assert len(m.events) == 3


@pytest.mark.parametrize(
    "new",
    [
        tss_descriptor(32, NEW_TSS, False, p=0),
        descriptor(9, base=NEW_TSS, limit=0x66),
        descriptor(1, base=NEW_TSS, limit=0x2A),
    ],
    ids=["absent", "short 32", "short 16"],
)
def test_a_bad_new_tss(new):
    m = task(32, new=new)
    assert switch(m, "call") == EMULATION_OK
    assert m.fault[:2] == (10, NEW)
    assert len(m.events) == 2


@pytest.mark.parametrize("selectors", [(0x1000, OLD), (NEW, 0x1000)], ids=["new", "old"])
def test_a_selector_beyond_the_gdt(selectors):
    new, old = selectors
    m = task(32)
    seg = (*m.system.seg[:6], msgspec.structs.replace(m.system.seg[6], sel=old), m.system.seg[7])
    m.ops._change(seg=seg)
    emulator_task_switch(m.ctxt, new, -1, TASK_SWITCH_JMP, None)
    assert m.fault[:2] == (13, 0x1000)  # a processor has #TS


def test_cr3_that_is_refused():
    m = task(32, {"op": "set_cr", "result": 1})
    assert switch(m, "jmp") == EMULATION_OK
    assert m.fault[:2] == (13, 0)
    assert m.ctxt.eip == 0x6000


@pytest.mark.parametrize(
    ("tss", "fault"),
    [
        (Tss(ldt=DATA), (10, DATA)),
        (Tss(es=LDT), (10, LDT)),
        (Tss(cs=0), (13, 0)),
        (Tss(cs=DATA), (10, DATA)),
        (Tss(cs=CODE | 3), (10, DATA)),  # CPL is 3 at once, and ES comes first
        (Tss(ss=CODE), (10, CODE)),
        (Tss(ds=0x1000), (13, 0x1000)),
        (Tss(fs=LDT), (10, LDT)),
        (Tss(gs=NEW), (10, NEW)),
    ],
)
def test_quirk_47_a_fault_is_lost_and_leaves_partial_state(tss, fault):
    m = task(32, tss=tss)
    assert switch(m, "call") == EMULATION_OK
    assert m.fault[:2] == fault
    assert not m.ctxt.have_exception  # nobody will inject it
    assert m.ctxt.eip == 0x6000
    assert m.ops.gpr[0] == 0xA0  # registers are the old task's
    assert m.ctxt.eflags == 0x202  # flags, CR3 and selectors the new one's
    assert m.system.seg[0].sel == tss.es
    assert m.system.seg[6].sel == OLD
    assert not m.system.cr0 & X86_CR0_TS


@pytest.mark.parametrize("field", ["ldt", "es", "cs", "ss", "ds"])
def test_faults_of_16_bit_loads(field):
    m = task(16, tss=Tss(**{field: 0x1000}))
    assert switch(m, "jmp") == EMULATION_OK
    assert m.fault[:2] == (13, 0x1000)


def test_neither_type_nor_trap_bit_is_looked_at():
    m = task(32, new=descriptor(12, base=NEW_TSS))  # a call gate
    assert switch(m, "jmp") == EMULATION_OK
    assert m.ctxt.rc == X86EMUL_CONTINUE


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("reason", REASONS)
def test_a_failure_at_every_step(bits, reason):
    plain = task(bits, reason=reason)
    switch(plain, reason)
    for index, step in enumerate(plain.events):
        if step[0] not in ("read", "write"):
            continue
        op = f"{step[0]}_std"
        count = sum(other[0] == step[0] for other in plain.events[: index + 1])
        for result in ("propagate_fault", "unhandleable", "io_needed"):
            m = task(bits, {"op": op, "nth": count, "result": result}, reason=reason)
            returned = switch(m, reason)
            busy_bit = step[0] == "write" and step[1] in (GDT_BASE + OLD, GDT_BASE + NEW)
            if busy_bit:  # KVM ignores what becomes of the busy bits
                assert (returned, m.ctxt.rc) == (EMULATION_OK, X86EMUL_CONTINUE)
                continue
            assert returned == (EMULATION_FAILED if result == "unhandleable" else EMULATION_OK)
            assert m.ctxt.rc == X86EMUL_NAMES.index(result)
            assert m.events == plain.events[: index + 1]
            assert (m.ctxt.eip, m.ops.gpr[0]) == (0x6000, 0xA0)
