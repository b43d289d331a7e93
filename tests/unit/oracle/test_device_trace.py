"""Device traces: what is architectural counts, where an access is cut does not."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import read, write

from emufuzz.case.build import build_case
from emufuzz.case.devices import PIO, trace_to_obj
from emufuzz.case.model import Outcome
from emufuzz.oracle.compare import FINDING, SKIPPED, agree, compare, judge
from emufuzz.oracle.device_trace import DEVICE_TRACE, has_pieces, joined, show_access, trace_of


def outcome(case, *accesses, **changes):
    made = Outcome(case.id, case.gpr, case.rip + 2, case.rflags, case.system, **changes)
    made.extra = {DEVICE_TRACE: trace_to_obj(accesses)}
    return made


class Silent:
    ledger = ()

    def __init__(self, *gaps):
        self.gaps = gaps

    def unchecked(self, case, outcome):
        return self.gaps


MOV = build_case("prot64", bytes.fromhex("8b06"))
MOVUPS = build_case("prot64", bytes.fromhex("0f1006"))


@pytest.mark.parametrize(
    ("mode", "code", "pieces"),
    [
        ("prot64", "8b06", False),
        ("prot64", "488b06", False),
        ("prot64", "f348a5", False),  # rep movsq: 8 bytes at a time
        ("prot64", "0f1006", True),  # movups
        ("prot64", "480fc70e", True),  # cmpxchg16b
        ("prot64", "0f010e", True),  # sidt
        ("prot32", "0f0106", True),  # sgdt
        ("prot32", "c506", True),  # lds: 6 bytes
        ("prot16", "c504", True),  # lds: 4 bytes that are two values
        ("prot32", "ff2e", True),  # jmp far
        ("prot32", "60", False),  # pusha: eight accesses
        ("prot32", "90", False),
    ],
)
def test_which_instructions_have_operands_in_pieces(mode, code, pieces):
    assert has_pieces(build_case(mode, bytes.fromhex(code))) is pieces


def test_pieces_of_one_operand_are_joined():
    kvm = [write(0xB002, "00" * 8), write(0xB00A, "11" * 8)]
    other = [write(0xB002, "00" * 4), write(0xB006, "0000000011111111"), write(0xB00E, "11" * 4)]
    whole = [write(0xB002, "00" * 8 + "11" * 8)]
    assert joined(kvm, pieces=True) == joined(other, pieces=True) == whole
    assert joined(kvm, pieces=False) == kvm


def test_an_access_over_a_page_end_is_one():
    assert joined([read(0xBFFE, "0102"), read(0xC000, "0304")], pieces=False) == [read(0xBFFE, "01020304")]


@pytest.mark.parametrize(
    "pair",
    [
        (read(0xB000, "01"), write(0xB001, "02")),  # another direction
        (read(0xB000, "01"), read(0xB002, "02")),  # a gap
        (read(0xB001, "01"), read(0xB000, "02")),  # downwards
        (read(0x60, "01", PIO), read(0x61, "02", PIO)),  # ports
        (read(0x5FFF, "01", PIO), read(0x6000, "02", PIO)),
    ],
)
def test_other_neighbours_stay_apart(pair):
    assert joined(pair, pieces=True) == list(pair)


WANTED = (read(0xB000, "01020304"), write(0xB008, "05"))
# fmt: off
DAMAGES = {
    "order":     (WANTED[1], WANTED[0]),
    "size":      (read(0xB000, "0102"), WANTED[1]),
    "cut":       (read(0xB000, "0102"), read(0xB002, "0304"), WANTED[1]),
    "address":   (read(0xB001, "01020304"), WANTED[1]),
    "direction": (write(0xB000, "01020304"), WANTED[1]),
    "data":      (WANTED[0], write(0xB008, "06")),
    "missing":   WANTED[:1],
    "more":      (*WANTED, WANTED[1]),
    "kind":      (WANTED[0], write(0xB008, "05", PIO)),
    "nothing":   (),
}
# fmt: on


@pytest.mark.parametrize("name", DAMAGES)
def test_order_size_count_direction_and_data_count(name):
    ours, theirs = outcome(MOV, *DAMAGES[name]), outcome(MOV, *WANTED)
    assert not agree(ours, theirs)
    (difference,) = compare(MOV, ours, theirs)
    assert (difference.kind, difference.field) == ("device-trace", DEVICE_TRACE)
    assert difference.subject != difference.oracle
    assert judge(MOV, ours, theirs, Silent()).kind == FINDING
    assert judge(MOV, ours, theirs, Silent((DEVICE_TRACE, "g")))[:2] == (SKIPPED, "g")
    assert judge(MOV, ours, theirs, Silent(("mem", "g"))).kind == FINDING


def test_the_first_difference_is_shown_with_its_place():
    ours, theirs = outcome(MOV, WANTED[0]), outcome(MOV, *WANTED)
    (difference,) = compare(MOV, ours, theirs)
    assert difference[2:] == ("none", "mmio write 0xb008 05", 0xB008)
    assert show_access(read(0x60, "ff", PIO)) == "pio read 0x60 ff"


def test_equal_traces_agree_whatever_their_cuts():
    assert agree(outcome(MOV, *WANTED), outcome(MOV, *WANTED))
    ours = outcome(MOVUPS, read(0xBFFC, "00" * 4), read(0xC000, "00" * 8), read(0xC008, "00" * 4))
    theirs = outcome(MOVUPS, read(0xBFFC, "00" * 4), read(0xC000, "00" * 4), read(0xC004, "00" * 8))
    assert not agree(ours, theirs)
    assert compare(MOVUPS, ours, theirs) == ()


def test_a_side_without_a_trace_is_not_compared():
    ours, theirs = outcome(MOV), outcome(MOV, *WANTED)
    ours.extra = None
    assert trace_of(ours) is None
    assert agree(ours, theirs)
    ours.extra = {"exits": []}
    assert compare(MOV, ours, theirs) == ()


def test_other_members_of_the_path_are_not_compared():
    ours, theirs = outcome(MOV, *WANTED), outcome(MOV, *WANTED)
    ours.extra["exits"] = [{"reason": "mmio"}]
    ours.extra["injected"] = [{"vector": 1}]
    assert agree(ours, theirs)
    assert compare(MOV, ours, theirs) == ()


def test_a_missing_fault_hides_the_trace():
    ours = outcome(MOV, *WANTED)
    theirs = outcome(MOV, exception=(13, 0, None), rc="propagate_fault")
    assert [d.kind for d in compare(MOV, ours, theirs)] == ["fault-missing"]


def test_a_case_of_a_path_is_compared_as_hardware_runs_it():
    """Behind the forced-emulation prefix lies a MOVUPS, whose pieces are joined."""
    case = msgspec.structs.replace(
        MOVUPS, path="fep", code=b"\x0f\x0bkvm" + MOVUPS.code, extra={"kvm": {"knobs": {}}}
    )
    ours = outcome(case, read(0xB000, "00" * 8), read(0xB008, "00" * 8))
    theirs = outcome(case, read(0xB000, "00" * 4), read(0xB004, "00" * 8), read(0xB00C, "00" * 4))
    assert compare(case, ours, theirs) == ()
