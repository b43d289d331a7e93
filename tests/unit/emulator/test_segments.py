"""Segment loads whose memory accesses fail, descriptor tables in odd places, the mode after a change."""

from __future__ import annotations

import pytest
from support.emulate import PF, descriptor, gdt_with, run
from support.machine import Machine, machine

from emufuzz.arch.cr import EFER_LMA
from emufuzz.arch.rflags import X86_EFLAGS_VM
from emufuzz.case.build import CODE_BASE, DATA_BASE, GDT_BASE, LDT_BASE, STACK_TOP, build_case
from emufuzz.case.model import UNUSABLE, TableRegister
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.emulator.insn.farbranch import emulate_int_real
from emufuzz.emulator.task import TASK_SWITCH_JMP, emulator_task_switch
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_OK,
    X86EMUL_CONTINUE,
    X86EMUL_PROPAGATE_FAULT,
)
from emufuzz.subject.flat.scripted import ScriptedOps

SEL = 0x80
WIDE_TSS = descriptor(9, base=0x8000) + bytes(8)


@pytest.mark.parametrize(
    ("mode", "code", "op", "nth"),
    [
        ("prot32", "8ed8", "write_std", 1),
        ("prot64", "0f00d8", "read_std", 2),
        ("prot64", "0f00d8", "cmpxchg_emulated", 1),
        ("prot32", "0f00d8", "cmpxchg_emulated", 1),
    ],
    ids=["accessed bit", "upper base", "busy bit, 64-bit", "busy bit, 32-bit"],
)
def test_a_load_whose_descriptor_cannot_be_used(mode, code, op, nth):
    slots = gdt_with({SEL: WIDE_TSS if code == "0f00d8" else descriptor(2, s=1)})
    done = run(mode, code, rax=SEL, callbacks=[{"op": op, "nth": nth, "result": "propagate_fault"}], **slots)
    assert (done.rc, done.fault[0]) == ("propagate_fault", PF)
    assert not any(event[0] == "set_segment" for event in done.events)


def test_a_system_base_must_be_canonical():
    slots = gdt_with({SEL: descriptor(9, base=0x8000) + (0x8000).to_bytes(8, "little")})
    assert run("prot64", "0f00d8", rax=SEL, **slots).fault == (13, SEL, None)


def test_descriptor_addresses_have_32_bits_outside_long_mode():
    slots = gdt_with({SEL: descriptor(3, s=1)})
    slots["gdtr"] = TableRegister((1 << 32) + GDT_BASE, 0xFFF)
    done = run("prot32", "8ed8", rax=SEL, **slots)
    assert done.events[0] == ("read", GDT_BASE + SEL, 8, "sys")


def test_the_new_tss_leaves_with_the_old_ldt():
    """A TSS in the LDT, which no processor takes: its busy bit has no place any more, and nobody cares."""
    tss = bytes(104)
    m = machine("prot32", data={LDT_BASE + 8: descriptor(9, base=DATA_BASE, limit=0x67), DATA_BASE: tss})
    m.ops._change(gdtr=TableRegister(GDT_BASE, 0xFFF))
    emulator_task_switch(m.ctxt, 8 | 4, -1, TASK_SWITCH_JMP, None)
    assert m.fault[:2] == (13, 0)  # the empty TSS has a null CS, loaded after LDTR
    assert m.system.seg[7].p == 0


def test_the_busy_bit_of_a_tss_that_is_gone():
    words = [0] * 26
    words[19], words[20] = 0x08, 0x28
    data = {
        LDT_BASE + 8: descriptor(9, base=DATA_BASE, limit=0x67),
        DATA_BASE: b"".join(word.to_bytes(4, "little") for word in words),
    }
    m = machine("prot32", data=data)
    result = emulator_task_switch(m.ctxt, 8 | 4, -1, TASK_SWITCH_JMP, None)
    assert (result, m.ctxt.rc) == (EMULATION_OK, X86EMUL_CONTINUE)
    assert not m.read(LDT_BASE + 8 + 5, 1)[0] & 2


def test_pop_addresses_by_the_incremented_stack_pointer():
    done = run("prot64", "8f0424", data={STACK_TOP: b"\x11\x22\x33\x44\x55\x66\x77\x88"})
    assert done.mem(STACK_TOP + 8, 8) == 0x8877665544332211
    assert done.reg("rsp") == STACK_TOP + 8


class Restored(ScriptedOps):
    """System-management mode that is left into the state of `after`."""

    __slots__ = ("after", "flags")

    def is_smm(self, ctxt: X86EmulateCtxt) -> bool:
        return True

    def leave_smm(self, ctxt: X86EmulateCtxt) -> int:
        self._change(**self.after)
        ctxt.eflags = self.flags
        return X86EMUL_CONTINUE


@pytest.mark.parametrize(
    ("after", "flags"),
    [
        ({"cr0": 0x10, "efer": EFER_LMA}, 2),
        ({"cr0": 0x11, "efer": EFER_LMA}, 2 | X86_EFLAGS_VM),
        ({"cr0": 0x11, "efer": 0, "seg": (UNUSABLE,) * 8}, 2),
    ],
    ids=["real mode", "virtual-8086 mode", "no CS"],
)
def test_no_mode_fits_the_restored_state(after, flags):
    m = Machine(build_case("prot64", b"\x0f\xaa"), ops=Restored)
    m.ops.after, m.ops.flags = after, flags
    assert m.step() == EMULATION_FAILED


def test_interrupts_for_real_mode_alone():
    m = machine("prot32")
    m.ctxt.op_bytes = 4
    assert emulate_int_real(m.ctxt, 3) == X86EMUL_PROPAGATE_FAULT  # CS is not loaded like this
    assert m.fault[0] == 13
    assert m.ctxt.next_eip == CODE_BASE


@pytest.mark.parametrize(
    ("code", "regs"),
    [("ec", {"rdx": 0x5658}), ("ec", {"rdx": 0x5659}), ("0f33", {"rcx": 0x10000})],
    ids=["vmport", "vmrpc", "pseudo counter"],
)
def test_vmware_backdoor(code, regs):
    for enabled in (False, True):
        m = machine("prot32", code, cpl=3, **regs)
        m.ops._change(seg=(*m.system.seg[:6], UNUSABLE, m.system.seg[7]))
        m.ctxt.enable_vmware_backdoor = enabled
        m.step()
        refused_by_check = not m.events
        assert refused_by_check != enabled


class Refusing(ScriptedOps):
    """set_dr as it would have to answer for MOV to DR to fault."""

    __slots__ = ()

    def set_dr(self, ctxt: X86EmulateCtxt, dr: int, val: int) -> int:
        return -1


def test_a_negative_answer_of_set_dr_is_a_fault():
    m = Machine(build_case("prot64", bytes.fromhex("0f23c0")), ops=Refusing)
    assert m.step() == EMULATION_OK
    assert m.fault[:2] == (13, 0)
