"""The register cache; tagged, canonical and wrapping addresses; supplied instruction bytes."""

from __future__ import annotations

import pytest
from support.emulate import GP, run
from support.machine import Machine, machine

from emufuzz.arch.cr import X86_CR4_LA57
from emufuzz.case.build import DATA_BASE, build_case
from emufuzz.emulator.ctxt import emulator_invalidate_register_cache, reg_read, reg_write
from emufuzz.emulator.x86emul import (
    EMULATION_OK,
    X86EMUL_CONTINUE,
    X86EMUL_F_FETCH,
    X86EMUL_F_INVLPG,
    X86EMUL_F_WRITE,
    X86EMUL_MODE_PROT32,
)
from emufuzz.subject.flat.scripted import ScriptedOps


def test_invalidated_registers_are_read_again():
    m = machine("prot64", rax=1)
    assert reg_read(m.ctxt, 0) == 1
    m.ops.gpr[0] = 2
    assert reg_read(m.ctxt, 0) == 1
    reg_write(m.ctxt, 1, 9)
    emulator_invalidate_register_cache(m.ctxt)
    assert reg_read(m.ctxt, 0) == 2
    assert reg_read(m.ctxt, 1) == 0
    assert m.ctxt.regs_dirty == 0


class Tagged(ScriptedOps):
    """Linear-address masking for user pointers (LAM_U57), as the VMX callback strips them."""

    __slots__ = ("asked",)

    def __init__(self, entries=()) -> None:
        super().__init__(entries)
        self.asked: list[int] = []

    def get_untagged_addr(self, ctxt, addr: int, flags: int) -> int:
        self.asked.append(flags)
        if flags & (X86EMUL_F_FETCH | X86EMUL_F_INVLPG) or addr >> 63:
            return addr
        return addr & (1 << 57) - 1


@pytest.mark.parametrize(("code", "flags"), [("8b18", 0), ("8918", X86EMUL_F_WRITE)])
def test_tags_are_stripped_from_operands(code, flags):
    m = Machine(build_case("prot64", bytes.fromhex(code), rax=DATA_BASE | 0x1A << 57), ops=Tagged)
    assert m.step() == EMULATION_OK
    assert m.ctxt.rc == X86EMUL_CONTINUE
    assert m.ops.asked == [flags]
    assert m.events[0][1] == DATA_BASE


@pytest.mark.parametrize("code", ["0f0138", "ffe0"], ids=["invlpg", "jmp"])
def test_tags_stay_where_they_have_no_meaning(code):
    m = Machine(build_case("prot64", bytes.fromhex(code), rax=DATA_BASE | 0x1A << 57), ops=Tagged)
    m.step()
    assert not any(event[0] == "invlpg" for event in m.events)
    assert m.ctxt.have_exception == (code == "ffe0")


def test_the_end_of_the_address_space():
    last = (1 << 64) - 2
    fetched = run("prot64", "b801", rip=last, data={0: b"\x02\x03\x04"})
    assert fetched.rip == 3  # the instruction goes on at 0
    assert fetched.reg("rax") == 0x04030201
    pages = {last: b"\xff\x00", 0: bytes(16)}
    table = run("prot64", "0f0110", rax=last, data=pages)
    assert table.outcome.system.gdtr.limit == 0xFF
    assert run("prot64", "488b18", rax=last, data={**pages, 0: b"\x01"}).reg("rbx") == 0x100FF


def test_descriptor_tables_need_canonical_bases():
    data = {DATA_BASE: b"\xff\x0f" + (1 << 47).to_bytes(8, "little")}
    for code in ("0f0110", "0f0118"):
        assert run("prot64", code, rax=DATA_BASE, data=data).fault == GP
        assert run("prot64", code, rax=DATA_BASE, data=data, cr4=0x620 | X86_CR4_LA57).rc == "continue"


def test_supplied_instruction_bytes_are_not_fetched():
    m = machine("prot32", "cc")
    assert m.decode(bytes.fromhex("b801000000")) == EMULATION_OK
    assert m.ops.log == []
    assert m.ctxt.mode == X86EMUL_MODE_PROT32
    m.emulate()
    assert m.ops.gpr[0] == 1
