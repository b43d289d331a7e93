"""What an instruction accesses, as the ledgers see it."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from emufuzz.case.build import build_case, build_system
from emufuzz.case.segments import segment_data
from emufuzz.oracle.compare import SKIPPED, judge
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject


def pop_with_wide_stack(code: str, rsp: int):
    """16-bit code on a stack whose pointer has 32 bits; the stack segment ends at 64 KiB."""
    stack = replace(segment_data(0x28, bits=32, dpl=0), limit=0xFFFF, g=0)
    return build_case(
        "prot16", bytes.fromhex(code) + b"\xf4", system=build_system("prot16", ss=stack), rsp=rsp
    )


@pytest.mark.parametrize("code", ["5c", "675c", "58", "c3"])
def test_the_stack_pointer_is_as_wide_as_ss_says_also_in_16_bit_code(code):
    case = pop_with_wide_stack(code, 0x7CB3C000)
    assert [access.offset for access in CaseInstruction(case).accesses] == [0x7CB3C000]


def test_a_stack_beyond_its_limit_is_a_gap_of_unicorn():
    case, oracle = pop_with_wide_stack("675c", 0x7CB3C000), UnicornOracle()
    [outcome], [answer] = FlatSubject().run((case,)), oracle.run((case,))
    verdict = judge(case, outcome, answer, oracle)
    assert (verdict.kind, verdict.reason) == (SKIPPED, "unicorn-segment-limit")


@pytest.mark.parametrize(("mode", "code"), [("prot16", "56"), ("prot16", "6756"), ("prot32", "6656")])
def test_a_push_goes_below_the_stack_pointer(mode, code):
    """iced has the displacement in the width of its own stack pointer."""
    stack = segment_data(0x28, bits=32, dpl=0)
    case = build_case(mode, bytes.fromhex(code), system=build_system(mode, ss=stack), rsp=0xC898)
    (access,) = CaseInstruction(case).accesses
    assert (access.linear, access.size) == (0xC896, 2)
