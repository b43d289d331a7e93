"""Proof tests of the ledger of segment registers in virtual-8086 mode."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import run

from emufuzz.arch.regs import SREG_NAMES
from emufuzz.case.build import STACK_TOP, build_case
from emufuzz.oracle.compare import FINDING, SKIPPED, judge
from emufuzz.oracle.unicorn.gaps_vm86 import VM86_GAPS
from emufuzz.subject.flat import FlatSubject

IOPL3 = 0x3000
# fmt: off
#: How each register is loaded.
PROOFS = {
    "vm86-es":       "8ec0",
    "vm86-es, les":  "c404",
    "vm86-cs":       "ea00600004",
    "vm86-cs, retf": "cb",
    "vm86-cs, call": "ff1c",
    "vm86-ss":       "8ed0",
    "vm86-ss, lss":  "0fb214",
    "vm86-ds":       "1f",
    "vm86-fs":       "0fa1",
    "vm86-gs":       "8ee8",
}
# fmt: on


def odd(name, code, mode="vm86"):
    """A segment in virtual-8086 mode whose limit is 4 GiB: hardware cannot be there."""
    data = {STACK_TOP: bytes.fromhex("0060000400000000")}
    case = build_case(mode, bytes.fromhex(code), flags=IOPL3, rax=0x123, rsi=0x8000, data=data)
    seg, number = list(case.system.seg), SREG_NAMES.index(name)
    seg[number] = msgspec.structs.replace(seg[number], limit=0xFFFFFFFF, g=1)
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg))), number


def of(name):
    return name.partition(",")[0].removeprefix("vm86-")


def test_every_register_has_a_proof():
    assert {f"unicorn-vm86-{of(name)}" for name in PROOFS} == {gap.id for gap in VM86_GAPS}


@pytest.mark.parametrize("name", PROOFS)
def test_the_gap_exists_and_is_recognised(oracle, name):
    case, number = odd(of(name), PROOFS[name])
    outcome = run(oracle, case)
    assert outcome.exception is None
    assert outcome.system.seg[number].limit == 0xFFFFFFFF
    assert (f"seg.{of(name)}", f"unicorn-vm86-{of(name)}") in oracle.unchecked(case, outcome)


def test_only_the_register_that_is_loaded_is_not_vouched_for(oracle):
    case, number = odd("es", "8ec0")
    (ours,), theirs = FlatSubject(events=False).run([case]), run(oracle, case)
    assert judge(case, ours, theirs, oracle)[:2] == (SKIPPED, "unicorn-vm86-es")
    for other in {0, 2, 3, 4, 5} - {number}:
        seg = list(ours.system.seg)
        seg[other] = msgspec.structs.replace(seg[other], base=seg[other].base ^ 16)
        damaged = msgspec.structs.replace(ours, system=msgspec.structs.replace(ours.system, seg=tuple(seg)))
        assert judge(case, damaged, theirs, oracle).kind == FINDING


@pytest.mark.parametrize(("mode", "code"), [("vm86", "8ed8"), ("vm86", "8cc0"), ("real", "8ec0")])
def test_others_and_other_modes_are_vouched_for(oracle, mode, code):
    case, _ = odd("es", code, mode)
    assert not {gap for _, gap in oracle.unchecked(case, run(oracle, case)) if "vm86" in gap}
