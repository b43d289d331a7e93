"""What passes between the emulator and its vcpu: stages, caches, answers, entry points from outside."""

from __future__ import annotations

import ast
import inspect
import re
from functools import cache
from pathlib import Path

import msgspec
import pytest
from support.emulate import UD, run
from support.machine import Machine, machine

from emufuzz import emulator
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_FIXED, X86_EFLAGS_IF, X86_EFLAGS_TF
from emufuzz.case.build import CODE_BASE, DATA_BASE, STACK_TOP, build_case, build_system
from emufuzz.case.model import Case
from emufuzz.emulator.access import read_emulated
from emufuzz.emulator.decode import emulator_can_use_gpa, x86_page_table_writing_insn
from emufuzz.emulator.execute import (
    X86_ICPT_POST_EXCEPT,
    X86_ICPT_POST_MEMACCESS,
    X86_ICPT_PRE_EXCEPT,
    x86_emulate_insn,
)
from emufuzz.emulator.faults import emulate_exception
from emufuzz.emulator.insn.farbranch import emulate_int_real
from emufuzz.emulator.ops import X86EmulateOps
from emufuzz.emulator.x86emul import (
    EMULATION_FAILED,
    EMULATION_INTERCEPTED,
    EMULATION_OK,
    EMULATION_RESTART,
    X86EMUL_CONTINUE,
    X86EMUL_INTERCEPTED,
    X86EMUL_IO_NEEDED,
    X86EMUL_MODE_REAL,
    X86EMUL_PROPAGATE_FAULT,
    X86EMUL_UNHANDLEABLE,
)
from emufuzz.subject.flat.scripted import ScriptedOps

IO_NEEDED = {"op": "read_emulated", "result": "io_needed"}


# -- the interface -------------------------------------------------------------------------------


def test_all_45_callbacks_are_documented_and_provided():
    names = [
        name for name, member in vars(X86EmulateOps).items() if inspect.isfunction(member) and name[0] != "_"
    ]
    assert len(names) == 45
    for name in names:
        assert (getattr(X86EmulateOps, name).__doc__ or "").strip(), name
        provided = inspect.signature(getattr(ScriptedOps, name)).parameters
        assert list(provided) == list(inspect.signature(getattr(X86EmulateOps, name)).parameters), name


@cache
def functions() -> list[tuple[str, str]]:
    """All functions of the emulator with their source."""
    trees = [ast.parse(path.read_text("utf-8")) for path in Path(emulator.__file__).parent.rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node.name, ast.unparse(node)) for node in nodes]


def callers_of(callback: str) -> set[str]:
    """The functions of the emulator that call a callback."""
    return {name for name, source in functions() if re.search(rf"\bops\.{callback}\b", source)}


def test_docstrings_name_callers():
    for name, member in vars(X86EmulateOps).items():
        if name[0] == "_" or not inspect.isfunction(member):
            continue
        doc = " ".join((inspect.getdoc(member) or "").split())
        said = re.search(r"Called by ([\w ,]+?)( and others)?\.", doc)
        assert said, name
        assert set(said[1].split(", ")) <= callers_of(name), name


# -- nested intercepts ---------------------------------------------------------------------------


class Nested(ScriptedOps):
    """A nested hypervisor that notes the stages, and intercepts at `at`."""

    __slots__ = ("at", "stages")

    def __init__(self, entries=()) -> None:
        super().__init__(entries)
        self.stages: list[int] = []
        self.at = 0

    def intercept(self, ctxt, stage: int) -> int:
        self.stages.append(stage)
        return X86EMUL_INTERCEPTED if stage == self.at else X86EMUL_CONTINUE


def nested(mode: str, code: str, at: int = 0, **kwargs) -> Machine:
    m = Machine(build_case(mode, bytes.fromhex(code), **kwargs), ops=Nested)
    m.ops.at = at
    return m


def test_stages_in_order():
    m = nested("prot64", "0f0110", rax=DATA_BASE)  # LGDT m
    assert m.step(check_intercepts=True) == EMULATION_OK
    assert m.ops.stages == [X86_ICPT_PRE_EXCEPT, X86_ICPT_POST_EXCEPT, X86_ICPT_POST_MEMACCESS]
    quiet = nested("prot64", "0f0110", rax=DATA_BASE)
    quiet.step()
    assert quiet.ops.stages == []
    other = nested("prot64", "8b18", rax=DATA_BASE)  # MOV is never intercepted
    other.step(check_intercepts=True)
    assert other.ops.stages == []


@pytest.mark.parametrize(
    ("stage", "events"),
    [
        (X86_ICPT_PRE_EXCEPT, []),
        (X86_ICPT_POST_EXCEPT, []),
        (X86_ICPT_POST_MEMACCESS, [("read", DATA_BASE, 4)]),
    ],
)
def test_an_intercept_ends_the_instruction(stage, events):
    m = nested("prot64", "0f0110", stage, rax=DATA_BASE)
    assert m.step(check_intercepts=True) == EMULATION_INTERCEPTED
    assert m.events == events
    assert m.ops.stages[-1] == stage
    assert (m.ctxt.eip, m.ctxt.eflags) == (CODE_BASE, X86_EFLAGS_FIXED)


def test_exceptions_lie_between_the_stages():
    m = nested("prot64", "0f0110", rax=DATA_BASE, cpl=3)
    assert m.step(check_intercepts=True) == EMULATION_OK
    assert m.fault[:2] == (13, 0)
    assert m.ops.stages == [X86_ICPT_PRE_EXCEPT]


# -- interrupts and system-management mode -------------------------------------------------------


def real_mode(**kwargs) -> Machine:
    data = {0x40 * 4: b"\x34\x12\x00\x20"}
    m = machine("real", "90", data=data, flags=X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC, **kwargs)
    m.ctxt.op_bytes = m.ctxt.ad_bytes = 2
    m.ctxt.next_eip = 0x7777
    m.ops.system = build_system("real", idtr=m.system.idtr.__class__(0, 0x3FF))
    return m


def test_interrupt_from_outside_an_instruction():
    m = real_mode()
    assert emulate_int_real(m.ctxt, 0x40) == X86EMUL_CONTINUE
    assert m.ctxt.next_eip == 0x1234
    assert m.system.seg[1].base == 0x20000
    assert m.ops.gpr[4] == STACK_TOP - 6
    flags = X86_EFLAGS_FIXED | X86_EFLAGS_IF | X86_EFLAGS_TF
    assert m.read(STACK_TOP - 6, 6) == b"\x77\x77\x00\x00" + flags.to_bytes(2, "little")
    assert m.ctxt.eflags == X86_EFLAGS_FIXED


@pytest.mark.parametrize(
    ("op", "nth"),
    [("write_emulated", 1), ("write_emulated", 2), ("write_emulated", 3), ("read_std", 1), ("read_std", 2)],
)
def test_interrupt_that_cannot_be_delivered(op, nth):
    case = build_case("real", b"\x90", data={0x3100: bytes(4)})
    m = Machine(case, {"op": op, "nth": nth, "result": "propagate_fault"})
    m.ctxt.op_bytes = 2
    assert emulate_int_real(m.ctxt, 0x40) == X86EMUL_PROPAGATE_FAULT
    assert m.ops.gpr[4] == STACK_TOP  # not committed
    assert len(m.events) == nth + (3 if op == "read_std" else 0)


def test_rsm():
    assert run("prot64", "0faa").fault == UD
    smm = {"op": "is_smm", "result": 1}
    left = run("prot32", "0faa", callbacks=[smm, {"op": "leave_smm", "result": "continue"}])
    assert (left.rc, left.rip) == ("continue", CODE_BASE + 2)


class InvalidSmram(ScriptedOps):
    """SMRAM holds a state that no processor can be in: leaving fails, real mode is what remains."""

    __slots__ = ("shutdown",)

    def is_smm(self, ctxt) -> bool:
        return True

    def leave_smm(self, ctxt) -> int:
        self._change(cr0=0x10, efer=0)
        return X86EMUL_UNHANDLEABLE

    def triple_fault(self, ctxt) -> None:
        self.shutdown = True


def test_rsm_of_an_invalid_state_shuts_down():
    m = Machine(build_case("prot64", b"\x0f\xaa"), ops=InvalidSmram)
    assert m.step() == EMULATION_OK
    assert m.ops.shutdown
    assert m.ctxt.mode == X86EMUL_MODE_REAL  # the mode is derived anew


# -- reads that userspace completes --------------------------------------------------------------


def test_a_completed_read_is_replayed_and_not_repeated():
    m = machine("prot64", "a7", {**IO_NEEDED, "nth": 2}, rsi=DATA_BASE, rdi=DATA_BASE + 8)
    assert m.step() == EMULATION_OK
    assert m.ctxt.rc == X86EMUL_IO_NEEDED
    assert (m.ctxt.eip, m.ops.gpr[6]) == (CODE_BASE, DATA_BASE)
    assert m.emulate() == EMULATION_OK  # EMULTYPE_NO_DECODE: the same context, not decoded again
    assert m.ctxt.rc == X86EMUL_CONTINUE
    assert [event[1] for event in m.events] == [DATA_BASE, DATA_BASE + 8, DATA_BASE + 8]
    assert (m.ctxt.eip, m.ops.gpr[6], m.ops.gpr[7]) == (CODE_BASE + 1, DATA_BASE + 4, DATA_BASE + 12)


def test_a_replayed_read_ignores_its_address():
    m = machine("prot64", "a7", {**IO_NEEDED, "nth": 2}, rsi=DATA_BASE, rdi=DATA_BASE + 8)
    m.step()
    m.ops.written[DATA_BASE >> 12] = b"\xff" * 4096  # memory changes meanwhile
    m.emulate()
    assert m.ctxt.src.val == 0
    assert m.ctxt.dst.orig_val == 0xFFFFFFFF


def test_a_port_that_userspace_reads():
    m = machine("prot64", "e570", {"op": "pio_in_emulated", "result": "io_needed"})
    assert m.step() == EMULATION_OK
    assert m.ctxt.rc == X86EMUL_IO_NEEDED
    assert m.emulate() == EMULATION_OK
    assert m.events == [("in", 0x70, 4), ("in", 0x70, 4)]
    assert m.ops.gpr[0] == 0xFFFFFFFF


def test_quirk_54_a_stack_read_that_userspace_completes_moves_rsp_twice():
    plain = machine("prot32", "61")  # POPA
    plain.step()
    m = machine("prot32", "61", {**IO_NEEDED, "nth": 3})
    m.step()
    assert m.ops.gpr[4] == STACK_TOP
    m.emulate()
    assert m.ctxt.rc == X86EMUL_CONTINUE
    assert plain.ops.gpr[4] == STACK_TOP + 32
    assert m.ops.gpr[4] == STACK_TOP + 32 + 8  # two pops were done before the third waited


def test_string_input_uses_up_what_was_read_ahead():
    m = Machine(
        build_case("prot32", bytes.fromhex("f36c"), rcx=3, rdx=0x70, rdi=DATA_BASE + 8, flags=1 << 10)
    )
    m.case = m.ops.case = _with_ports(m.case, b"abc")
    assert m.step() == EMULATION_RESTART  # DF set: one element per iteration
    assert (m.ctxt.io_read_pos, m.ops.gpr[1]) == (1, 2)
    assert (m.emulate(), m.emulate()) == (EMULATION_RESTART, EMULATION_OK)
    assert [event for event in m.events if event[0] == "in"] == [("in", 0x70, 1, 3)]
    assert m.read(DATA_BASE + 6, 3) == b"cba"


def _with_ports(case: Case, data: bytes) -> Case:
    return msgspec.structs.replace(case, port_in=data)


# -- internal inconsistencies --------------------------------------------------------------------


class Bugged(ScriptedOps):
    """Counts how often the virtual machine was declared dead."""

    __slots__ = ("bugs",)

    def __init__(self, entries=()) -> None:
        super().__init__(entries)
        self.bugs = 0

    def vm_bugged(self, ctxt) -> None:
        self.bugs += 1

    def read_emulated(self, ctxt, addr: int, size: int, fault) -> tuple[int, bytes]:
        return (
            (X86EMUL_PROPAGATE_FAULT, b"")
            if addr == 0xB000
            else super().read_emulated(ctxt, addr, size, fault)
        )


def bugged(mode: str, code: str, *scripts: dict, **kwargs) -> Machine:
    return Machine(build_case(mode, bytes.fromhex(code), **kwargs), *scripts, ops=Bugged)


def test_a_vector_that_does_not_exist():
    m = bugged("prot64", "90")
    assert emulate_exception(m.ctxt, 32, 0, valid=False) == X86EMUL_UNHANDLEABLE
    assert m.ops.bugs == 1


def test_a_fault_that_the_callback_did_not_fill_in():
    m = bugged("prot64", "8b18", rax=0xB000)
    m.decode()
    m.ctxt.exception.vector = 0xFF
    assert m.emulate() == EMULATION_FAILED
    assert m.ops.bugs == 1
    assert not m.ctxt.have_exception


def test_more_reads_than_the_cache_holds():
    m = bugged("prot64", "90")
    m.ctxt.mem_read_data = bytes(1020)
    m.ctxt.mem_read_pos = 1020
    assert read_emulated(m.ctxt, DATA_BASE, 4) == -X86EMUL_UNHANDLEABLE
    assert m.ops.bugs == 1
    m.ctxt.mem_read_data = bytes(1019)
    assert read_emulated(m.ctxt, DATA_BASE, 4) == 0


def test_nothing_decoded():
    with pytest.raises(ValueError, match="decoded"):
        x86_emulate_insn(machine("prot64").ctxt)


# -- what x86.c asks about a decoded instruction -------------------------------------------------


@pytest.mark.parametrize(
    ("code", "writes"),
    [("8918", True), ("c700", True), ("0fb118", True), ("0fc708", True), ("8700", True), ("ab", False),
     ("8b18", False), ("50", False), ("0100", False), ("0900", True), ("2100", True)],
)  # fmt: skip
def test_instructions_that_write_page_tables(code, writes):
    m = machine("prot64", code, rax=DATA_BASE)
    assert m.decode() == EMULATION_OK
    assert x86_page_table_writing_insn(m.ctxt) == writes


@pytest.mark.parametrize(
    ("code", "usable"),
    [("8b18", True), ("aa", True), ("f3aa", False), ("a4", False), ("ff30", False), ("f38b18", True)],
)
def test_when_the_fault_address_is_the_operand(code, usable):
    m = machine("prot64", code, rax=DATA_BASE, rsi=DATA_BASE, rdi=DATA_BASE, rcx=1)
    assert m.decode() == EMULATION_OK
    assert emulator_can_use_gpa(m.ctxt) == usable
