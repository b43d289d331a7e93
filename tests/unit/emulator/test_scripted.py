"""Scripted callback results: what a script may say, and how its answers reach the guest."""

from __future__ import annotations

import msgspec
import pytest
from support.emulate import GP, UD, run

from emufuzz.case.build import DATA_BASE, build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.subject.flat import FlatSubject


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
