"""Cases of several instructions in the Unicorn oracle, and what is vouched for at their end."""

from __future__ import annotations

import random

import msgspec
import pytest

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import NO_MEMORY
from emufuzz.oracle.compare import FINDING, judge, refusal
from emufuzz.oracle.unicorn.several import GAP_UNDEFINED
from emufuzz.subject.flat import FlatSubject

MODES = ("real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64")
#: Instructions without undefined flags, the same bytes in every mode.
FORMS = ("01d8", "11d1", "29d8", "39ca", "f7d3", "fec0", "86c1", "50", "5b", "98", "f9", "7300", "88e5")


def several(built, count, **changes):
    return msgspec.structs.replace(built, count=count, **changes)


@pytest.mark.parametrize("mode", MODES)
def test_sequences_end_as_in_the_port(oracle, case, mode):
    rng = random.Random(mode)
    subject = FlatSubject()
    for _ in range(20):
        forms = rng.choices(FORMS, k=6)
        gpr = {n: rng.getrandbits(32) for n in (0, 1, 2, 3)}
        built = several(case(mode, "".join(forms) + "f4", gpr), 6)
        (ours,), (theirs,) = subject.run([built]), oracle.run([built])
        assert not refusal(ours)
        ours.gpr = tuple(ours.gpr)
        assert judge(built, ours, theirs, oracle).kind != FINDING, forms
        assert (theirs.gpr, theirs.rip, theirs.rflags) == (ours.gpr, ours.rip, ours.rflags), forms
        assert theirs.pages == ours.pages


def test_the_first_fault_ends_the_run(oracle, case):
    built = several(case("prot32", "40" + "8903" + "40", {3: 0x1000}), 3)
    (outcome,) = oracle.run([built])
    assert outcome.exception == (14, 2, 0x1000)
    assert (outcome.gpr[0], outcome.rip) == (1, 0x6001)


def test_what_was_written_before_a_fault_stays(oracle, case):
    built = several(case("prot32", "8806" + "8903", {0: 0xAA, 3: 0x1000, 6: 0x8000}), 2)
    (outcome,) = oracle.run([built])
    assert outcome.exception == (14, 2, 0x1000)
    assert outcome.pages[8][0] == 0xAA


def test_a_branch_to_an_absent_page_faults_on_the_fetch(oracle, case):
    built = several(case("prot32", "ffe0", {0: 0x1000}), 2)
    (outcome,) = oracle.run([built])
    assert (outcome.exception, outcome.rip) == ((14, 0, 0x1000), 0x1000)


def test_code_that_an_instruction_wrote_is_run(oracle, case):
    """MOV byte [8000], 40 (INC EAX); a jump there."""
    built = several(case("prot32", "c605008000004090e9f31f0000"), 4)
    (outcome,) = oracle.run([built])
    assert (outcome.gpr[0], outcome.rip, sorted(outcome.pages)) == (1, 0x8001, [8])


def test_an_instruction_reads_the_code_before_it(oracle, case):
    built = several(case("prot32", "90" + "8a06", {6: 0x6000}), 2)
    assert oracle.run([built])[0].gpr[0] == 0x90


def test_a_repeated_instruction_counts_once_per_stopping_point(oracle, case):
    built = case("prot32", "f3aa90", {1: 1024 + 5, 7: 0x8000})
    ends = [oracle.run([several(built, n)])[0] for n in (1, 2, 3)]
    assert [(end.gpr[1], end.rip) for end in ends] == [(1024, 0x6000), (0, 0x6000), (0, 0x6002)]


def test_devices_go_on_where_the_step_before_left_them(oracle, case):
    devices = [{"kind": "mmio", "addr": "0x9000", "size": 8, "reads": "010203"}]
    built = several(case("prot32", "8a06" * 3, {6: 0x9000}), 3, extra={"devices": devices})
    (outcome,) = oracle.run([built])
    assert outcome.gpr[0] == 3
    assert [access["data"] for access in outcome.extra["device_trace"]] == ["01", "02", "03"]
    assert oracle.unchecked(built, outcome) == ()


def test_ports_go_on_where_the_step_before_left_them(oracle, case):
    built = several(case("prot32", "ececec", {2: 0x60}), 3, port_in=b"\x01\x02\x03")
    assert oracle.run([built])[0].gpr[0] == 3


def test_physical_memory_is_that_of_the_step_before(oracle, case):
    """MOV byte [8000], 40; MOV EAX, [8000] with 4 MiB pages."""
    directory = b"".join((n << 22 | 0x83).to_bytes(4, "little") for n in range(4))
    built = case("prot32", "c60540800000408a0640", {6: 0x8040}, cr3=0x1000, cr4=0x10)
    phys = [{"addr": "0x1000", "data": directory.hex()}, {"addr": "0x6000"}, {"addr": "0x8000"}]
    built = several(built, 3, mem=NO_MEMORY, extra={"phys": phys})
    (outcome,) = oracle.run([built])
    assert (outcome.gpr[0], outcome.rip) == (0x41, 0x600A)
    assert outcome.pages[8][0x40] == 0x40


def test_a_gap_on_the_way_leaves_nothing_vouched_for(oracle, case):
    built = several(case("prot32", "8fc8" + "90"), 2)
    assert oracle.unchecked(built, oracle.run([built])[0]) == (("all", "unicorn-pop-8f-reg"),)


def test_undefined_flags_are_followed(oracle, case):
    """AND leaves AF undefined: until ADD writes it; PUSHF and AAA read it."""

    def unchecked(code, count):
        built = several(case("prot32", code), count)
        return oracle.unchecked(built, oracle.run([built])[0])

    assert unchecked("21d8" + "01d8", 2) == ()
    assert unchecked("21d8" + "90", 2) == (("rflags", GAP_UNDEFINED),)
    assert unchecked("21d8" + "9c", 2) == (("all", GAP_UNDEFINED),)
    assert unchecked("21d8" + "37", 2) == (("all", GAP_UNDEFINED),)


def test_an_exit_path_runs_one_instruction(oracle, case):
    with pytest.raises(UnsupportedCaseError, match="count: of an exit path"):
        oracle.check(several(case("prot32", "90"), 2, path="ud"))


def test_a_difference_at_the_end_is_a_finding(oracle, case):
    built = several(case("prot32", "4040"), 2)
    (theirs,) = oracle.run([built])
    wrong = msgspec.structs.replace(theirs, gpr=(5, *theirs.gpr[1:]), leaf="40")
    assert judge(built, wrong, theirs, oracle).kind == FINDING


def test_a_gap_of_a_step_accounts_for_a_difference_at_the_end(oracle, case):
    """8F /1 is #UD on processors, which Unicorn runs as POP."""
    built = several(case("prot32", "90" + "8fc8"), 2)
    (theirs,) = oracle.run([built])
    right = msgspec.structs.replace(
        theirs, rc="propagate_fault", exception=(6, None, None), rip=built.rip + 1, gpr=built.gpr, leaf="8f"
    )
    verdict = judge(built, right, theirs, oracle)
    assert (verdict.kind, verdict.reason) == ("skipped", "unicorn-pop-8f-reg")
