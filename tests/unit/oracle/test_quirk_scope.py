"""What a quirk about an exception leaves alone must be as it was."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Fpu, Outcome, TableRegister
from emufuzz.oracle import quirks
from emufuzz.oracle.compare import Difference
from emufuzz.oracle.quirk_scope import SCOPES, rest_is_kept

CASE = build_case("prot64", b"\x8e\x3e", rsi=0xB000)
FAULT = (Difference("exception", "fault-vector", "", ""),)
SEGMENT = "kvm-rex-r-segment-register"
TABLE = "kvm-quirk-43-table-read"
STRADDLE = "kvm-quirk-01-canonical-straddle"


def outcome_of(fault=None, **changes):
    made = Outcome(CASE.id, CASE.gpr, CASE.rip, CASE.rflags, CASE.system, exception=fault)
    return msgspec.structs.replace(made, **changes)


def kept(quirk, ours, theirs, differences=FAULT):
    return rest_is_kept(quirk, CASE, ours, theirs, differences)


REFUSED = outcome_of((6, None, None))
COMPLETED = outcome_of()


def test_a_fault_that_leaves_all_as_it_was_is_fine():
    assert kept(SEGMENT, REFUSED, COMPLETED)


@pytest.mark.parametrize(
    "changes",
    [
        {"gpr": (1, *CASE.gpr[1:])},
        {"rip": CASE.rip + 2},
        {"rflags": CASE.rflags ^ 1},
        {"pages": {8: bytes(4096)}},
        {"system": msgspec.structs.replace(CASE.system, fpu=Fpu(mxcsr=0))},
        {"system": msgspec.structs.replace(CASE.system, seg=(CASE.system.seg[1], *CASE.system.seg[1:]))},
    ],
    ids=min,
)
def test_a_fault_that_changes_anything_is_not(changes):
    assert not kept(SEGMENT, msgspec.structs.replace(REFUSED, **changes), COMPLETED)


def test_memory_may_change_where_an_access_is_split():
    ours = outcome_of((14, 2, 1 << 47), pages={8: bytes(4096)})
    theirs = outcome_of((13, 0, None))
    assert kept(STRADDLE, ours, theirs)
    assert kept(STRADDLE, ours, theirs, (*FAULT, Difference("mem", "memory", "", "")))
    assert not kept(SEGMENT, ours, theirs)


def test_what_completes_changes_its_own_registers_alone():
    loaded = outcome_of(system=msgspec.structs.replace(CASE.system, gdtr=TableRegister(1, 2)))
    assert kept(TABLE, loaded, REFUSED)
    assert not kept(SEGMENT, loaded, REFUSED)
    assert not kept(TABLE, outcome_of(system=msgspec.structs.replace(CASE.system, cr2=1)), REFUSED)


def test_other_fields_are_not_excused_by_an_exception():
    assert not kept(SEGMENT, REFUSED, COMPLETED, (*FAULT, Difference("rbx", "gpr", "", "")))


def test_equal_exceptions_and_other_quirks_are_left_to_their_rules():
    moved = msgspec.structs.replace(REFUSED, rip=1)
    assert kept(SEGMENT, moved, REFUSED)
    assert kept("kvm-rep-zero-count", moved, COMPLETED)


def test_scopes_are_those_of_quirks():
    assert SCOPES.keys() <= {quirk.id for quirk in (*quirks.QUIRKS, *quirks.CHECK_QUIRKS)}
