"""Events in real mode by the SDM, and what KVM makes of vectors beyond the table."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import DATA_BASE, build_case, build_system
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import TableRegister, case_pages
from emufuzz.fuzz.engines import SUBJECTS
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.exits import ExitsOracle

IF, TF, AC, RF = 0x200, 0x100, 0x40000, 0x10000
GP, DF, PF = 13, 8, 14
#: Vector n leads to 5000H:n * 16.
TABLE = b"".join((n * 16).to_bytes(2, "little") + b"\x00\x50" for n in range(256))


@pytest.fixture(scope="module")
def exits():
    return ExitsOracle()


@pytest.fixture(scope="module")
def subject():
    return SUBJECTS["kvm"]()


def event_case(*, limit=0x3FF, base=DATA_BASE, rflags=IF, rsp=0xC800, code=b"\xcd\x21", **kvm):
    system = msgspec.structs.replace(build_system("real"), idtr=TableRegister(base, limit))
    case = build_case("real", code, system=system, data={DATA_BASE: TABLE}, flags=rflags, rsp=rsp)
    return msgspec.structs.replace(case, path="rmode-inject", extra={"kvm": kvm})


def run(exits, case):
    exits.check(case)
    (outcome,) = exits.run([case])
    return outcome


def words(case, outcome, linear, count):
    page = outcome.pages.get(linear >> 12) or case_pages(case)[linear >> 12]
    start = linear & 0xFFF
    return [int.from_bytes(page[start + 2 * i : start + 2 * i + 2], "little") for i in range(count)]


def stack_of(case, outcome):
    top = case.system.seg[2].base + (outcome.gpr[4] & 0xFFFF)
    return words(case, outcome, top, 3)


INTERRUPT = {"interrupt": {"vector": 0x21, "soft": False}}


def test_the_handler_is_entered_through_the_table(exits):
    case = event_case(rflags=IF | TF | AC, **INTERRUPT)
    outcome = run(exits, case)
    assert (outcome.rip, outcome.system.seg[1].sel, outcome.system.seg[1].base) == (0x210, 0x5000, 0x50000)
    assert outcome.gpr[4] == case.gpr[4] - 6
    assert stack_of(case, outcome) == [case.rip, case.system.seg[1].sel, case.rflags & 0xFFFF]
    assert not outcome.rflags & (IF | TF | AC)


# fmt: off
#: The event, its vector, and how far behind the instruction's beginning it comes back.
EVENTS = {
    "interrupt":          (INTERRUPT, 0x21, 0),
    "software interrupt": ({"interrupt": {"vector": 0x21, "soft": True}, "instruction_length": 2}, 0x21, 2),
    "nmi":                ({"nmi": 1}, 2, 0),
    "fault":              ({"pending": {"vector": GP, "error_code": 0}}, GP, 0),
    "breakpoint":         ({"pending": {"vector": 3}, "instruction_length": 1}, 3, 1),
}
# fmt: on


@pytest.mark.parametrize("name", EVENTS)
def test_kvm_delivers_events_as_the_sdm_says(exits, subject, name):
    kvm, vector, behind = EVENTS[name]
    case = event_case(**kvm)
    outcome = run(exits, case)
    assert outcome.rip == vector * 16
    assert stack_of(case, outcome)[0] == case.rip + behind
    (ours,) = subject.run([case])
    assert judge(case, ours, outcome, exits).kind == AGREE
    ours.rip += 1
    assert judge(case, ours, outcome, exits).kind == FINDING


def test_a_page_fault_leaves_its_address_in_cr2(exits):
    assert (
        run(exits, event_case(pending={"vector": PF, "error_code": 2, "payload": 0x9008})).system.cr2
        == 0x9008
    )


def test_which_bits_of_dr6_a_debug_exception_sets_is_left_open(exits):
    assert run(exits, event_case(pending={"vector": 1, "payload": 0x4000})).unchecked == (
        ("dr6", "exits-open"),
    )


# fmt: off
BEYOND = {
    "interrupt":       (INTERRUPT, GP),
    "nmi":             ({"nmi": 1}, GP),
    "benign":          ({"pending": {"vector": 6}}, GP),
    "contributory":    ({"pending": {"vector": GP, "error_code": 0}}, DF),
    "page fault":      ({"pending": {"vector": PF, "error_code": 0, "payload": 1}}, DF),
}
# fmt: on


@pytest.mark.parametrize("name", BEYOND)
def test_a_vector_beyond_the_table_is_an_exception(exits, subject, name):
    """Without error code, as in all of real mode; KVM does not look at the limit."""
    kvm, vector = BEYOND[name]
    case = event_case(limit=3, **kvm)
    outcome = run(exits, case)
    assert outcome.exception == (vector, None, None)
    assert (outcome.gpr, outcome.rip, outcome.pages) == (case.gpr, case.rip, {})
    (ours,) = subject.run([case])
    found = judge(case, ours, outcome, exits)
    assert (found.kind, found.reason) == (SKIPPED, "kvm-vector-table-limit"), found.differences


def damaged(ours, how):
    if how == "rip":
        ours.rip += 1
    elif how == "gpr":
        ours.gpr = (ours.gpr[0] ^ 1, *ours.gpr[1:])
    else:
        ours.pages = {}
    return ours


@pytest.mark.parametrize("how", ["rip", "gpr", "mem"])
def test_the_missing_limit_excuses_nothing_else(exits, subject, how):
    case = event_case(limit=3, **INTERRUPT)
    (ours,), (theirs,) = subject.run([case]), exits.run([case])
    assert judge(case, damaged(ours, how), theirs, exits).kind == FINDING


def test_kvm_shuts_down_where_it_finds_no_table_beyond_the_limit(exits, subject):
    case = event_case(limit=3, base=0x700000, **INTERRUPT)
    (ours,), (theirs,) = subject.run([case]), exits.run([case])
    assert ours.extra["exits"][-1]["reason"] == "SHUTDOWN"
    assert judge(case, ours, theirs, exits).reason.startswith("subject-left: ")
    assert judge(case, damaged(ours, "gpr"), theirs, exits).kind == FINDING


# fmt: off
OPEN = {
    "no table":          event_case(base=0x700000, **INTERRUPT),
    "no stack":          event_case(rsp=1, **INTERRUPT),
    "#df of a #df":      event_case(limit=3, pending={"vector": DF, "error_code": 0}),
}
# fmt: on


@pytest.mark.parametrize("name", OPEN)
def test_what_ends_on_the_way_is_left_open(exits, name):
    assert run(exits, OPEN[name]).unchecked == (("all", "exits-fault"),)


def test_without_length_the_instruction_at_rip_tells(exits):
    case = event_case(interrupt={"vector": 0x21, "soft": True})
    assert stack_of(case, run(exits, case))[0] == case.rip + 2


@pytest.mark.parametrize(
    ("kvm", "first"),
    [({"nmi": 1, **INTERRUPT}, 0x21), ({"nmi": 1, "pending": {"vector": 6}}, 6),
     ({"pending": {"vector": 6}, **INTERRUPT}, 6)],
)  # fmt: skip
def test_of_several_events_the_first_is_delivered(exits, kvm, first):
    assert run(exits, event_case(**kvm)).rip == first * 16


@pytest.mark.parametrize("kvm", [{}, {"vectoring_info": 1, **INTERRUPT}])
def test_without_an_event_of_its_own_nothing_is_worked_out(exits, kvm):
    with pytest.raises(UnsupportedCaseError, match=r"^kvm: "):
        exits.check(event_case(**kvm))


def test_a_debug_exception_clears_general_detect(exits, subject):
    case = event_case(pending={"vector": 1, "payload": 0x4000})
    dr = (*case.system.dr[:7], 0x2400)
    case = msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, dr=dr))
    outcome = run(exits, case)
    assert outcome.system.dr[7] == 0x400
    (ours,) = subject.run([case])
    assert ours.system.dr[7] == 0x400
    assert judge(case, ours, outcome, exits)[:2] == (SKIPPED, "exits-open")  # DR6
    kept = msgspec.structs.replace(ours.system, dr=(*ours.system.dr[:7], 0x2400))
    assert judge(case, msgspec.structs.replace(ours, system=kept), outcome, exits).kind == FINDING


def test_an_exception_of_l1s_is_not_delivered(exits):
    with pytest.raises(UnsupportedCaseError, match=r"^kvm.pending: the exception is L1's"):
        exits.check(event_case(pending={"vector": 14, "error_code": 0, "nested": True}))
