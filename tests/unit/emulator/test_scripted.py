"""Scripted callback results: what a script may say, and how its answers reach the guest."""

from __future__ import annotations

import msgspec
import pytest
from support.emulate import GP, UD, descriptor, run

from emufuzz.case.build import DATA_BASE, GDT_BASE, build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import TableRegister
from emufuzz.emulator.x86emul import X86EMUL_NAMES
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.flat.scripted import RESULT_OPS


def check(**entry) -> str:
    """What FlatSubject says about a script with this entry; "" if it takes it."""
    case = msgspec.structs.replace(build_case("prot64", b"\x90"), extra={"callbacks": [entry]})
    try:
        FlatSubject().check(case)
    except UnsupportedCaseError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"op": "read_std", "nth": 1, "result": "io_needed"}, ""),
        ({"op": "read_std", "fault": {"vector": "0xe", "error_code": "0x2", "address": "0x8000"}}, ""),
        ({"op": "set_cr", "result": 1}, ""),
        ({"op": "read_std", "nth": 0}, "callbacks[0].nth: calls are counted from 1"),
        ({"op": "read_gpr", "result": 0}, "callbacks[0].op: read_gpr is no callback whose"),
        ({"op": "is_smm", "result": 2}, "callbacks[0].result: is_smm answers 0 or 1"),
        ({"op": "set_cr", "result": "io_needed"}, "callbacks[0].result: set_cr answers an int"),
        ({"op": "pio_in_emulated", "result": "intercepted"},
         "callbacks[0].result: pio_in_emulated answers continue or io_needed"),
        ({"op": "fetch", "result": "maybe"}, "callbacks[0].result: fetch answers one of continue, "),
        ({"op": "fetch", "fault": {"vector": 32}}, "callbacks[0].fault.vector: exceptions have"),
    ],
)  # fmt: skip
def test_scripts_are_checked(entry, message):
    assert check(**entry).startswith(message)
    assert bool(check(**entry)) == bool(message)


def test_a_call_is_scripted_once():
    entry = {"op": "fetch", "result": "io_needed"}
    with pytest.raises(UnsupportedCaseError, match=r"callbacks\[1\].nth: call 1 is scripted twice"):
        run("prot64", "90", callbacks=[entry, entry])


def test_other_surroundings_are_refused():
    case = msgspec.structs.replace(build_case("prot64", b"\x90"), extra={"devices": []})
    with pytest.raises(UnsupportedCaseError, match="devices: the emulator alone cannot take it"):
        FlatSubject().check(case)


def test_a_scripted_fault_is_the_guests():
    fault = {"vector": 14, "error_code": 9, "address": 0x1234}
    done = run("prot64", "8b18", rax=DATA_BASE, callbacks=[
        {"op": "read_emulated", "result": "propagate_fault", "fault": fault}])  # fmt: skip
    assert done.fault == (14, 9, 0x1234)
    again = run("prot64", "8b18", rax=DATA_BASE)
    assert again.rc == "continue"  # the script goes with its case


@pytest.mark.parametrize(
    ("code", "op", "result", "fault"),
    [
        ("f30fc7f8", "guest_has_rdpid", 0, UD),
        ("0f38f018", "guest_has_movbe", 0, UD),
        ("0f30", "set_msr_with_filter", "propagate_fault", GP),
        ("0f32", "get_msr_with_filter", "propagate_fault", GP),
        ("0f33", "read_pmc", 1, GP),
        ("0f33", "check_rdpmc_early", 1, GP),
        ("0f22d8", "set_cr", 1, GP),
        ("0f01c1", "fix_hypercall", "propagate_fault", UD),
        ("f4", "intercept", "propagate_fault", UD),
    ],
)
def test_answers_that_become_faults(code, op, result, fault):
    index = 0 if "pmc" in op else 0xC0000082
    msr = ((0xC0000082, 0),)
    done = run("prot64", code, rax=DATA_BASE, rcx=index, msr=msr, callbacks=[{"op": op, "result": result}])
    assert done.fault == fault


def test_fxsr_is_asked():
    done = run("prot32", "0fae00", rax=DATA_BASE, callbacks=[{"op": "guest_has_fxsr", "result": 0}])
    assert done.fault == UD


SMM = {"op": "is_smm", "result": 1}
GDT_SLOT = {"gdtr": TableRegister(GDT_BASE, 0xFFF), "data": {GDT_BASE + 0x80: descriptor(2, s=1)}}
#: Callback -> an instruction that calls it, and the machine it needs.
CALLERS = {
    "fetch":               ("prot64", "90", {}),
    "read_std":            ("prot32", "8ed8", {"rax": 0x80, **GDT_SLOT}),
    "write_std":           ("prot32", "8ed8", {"rax": 0x80, **GDT_SLOT}),
    "read_emulated":       ("prot64", "8b18", {"rax": DATA_BASE}),
    "write_emulated":      ("prot64", "8918", {"rax": DATA_BASE}),
    "cmpxchg_emulated":    ("prot64", "f00118", {"rax": DATA_BASE}),
    "get_msr_with_filter": ("prot64", "0f32", {"rcx": 0x10, "msr": ((0x10, 1),)}),
    "set_msr_with_filter": ("prot64", "0f30", {"rcx": 0x10, "msr": ((0x10, 1),)}),
    "fix_hypercall":       ("prot64", "0f01c1", {}),
    "intercept":           ("prot64", "f4", {}),
    "leave_smm":           ("prot64", "0faa", {}),
}  # fmt: skip


def after(op: str, result: str) -> str:
    """The outcome's rc when the first call of `op` answers `result`."""
    if op == "leave_smm":
        return "continue"  # what is left to do is a shutdown
    if op == "fetch":
        return "propagate_fault" if result == "propagate_fault" else "unhandleable"
    return result


@pytest.mark.parametrize("result", X86EMUL_NAMES[1:])
@pytest.mark.parametrize("op", CALLERS)
def test_each_callback_with_each_result(op, result):
    mode, code, machine = CALLERS[op]
    others = [SMM] if op == "leave_smm" else []
    assert set(CALLERS) == set(RESULT_OPS)
    done = run(mode, code, callbacks=[*others, {"op": op, "result": result}], **machine)
    assert done.rc == after(op, result)
    assert (done.fault is not None) == (done.rc == "propagate_fault")
    if done.rc != "continue":
        assert tuple(done.outcome.gpr) == done.case.gpr
        assert (done.rip, done.flags) == (done.case.rip, done.case.rflags)
        assert done.outcome.pages == {}
    undisturbed = run(mode, code, callbacks=[*others, {"op": op, "result": "continue"}], **machine)
    assert undisturbed.rc == "continue"
