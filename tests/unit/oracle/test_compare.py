"""Comparison: nothing that both sides define is missed, nothing undefined is reported."""

from __future__ import annotations

import timeit

import msgspec
import pytest

from emufuzz.arch.rflags import X86_EFLAGS_AF, X86_EFLAGS_CF, X86_EFLAGS_OF, X86_EFLAGS_SF, X86_EFLAGS_ZF
from emufuzz.case.model import ZERO_PAGE, Memory, Outcome
from emufuzz.fuzz.environments import environments
from emufuzz.fuzz.generate import generate_batch
from emufuzz.oracle.compare import (
    AGREE,
    FINDING,
    KINDS,
    SKIPPED,
    agree,
    compare,
    judge,
    primary_kind,
    refusal,
    undefined_now,
)

PF = (14, 2, 0x8000)


class Silent:
    ledger = ()
    """An oracle without gaps, or with those given."""

    name = "silent"

    def __init__(self, *gaps):
        self.gaps = gaps

    def unchecked(self, case, outcome):
        return self.gaps


def case_of(code="00c0", mode="prot32", **changes):
    env = environments(1, mode)[0]
    template = generate_batch(1, 0, 1)[0]
    changes = {"gpr": (0,) * 16, "mem": Memory(((0x8000, b""),)), **changes}
    return msgspec.structs.replace(
        template, mode=mode, code=bytes.fromhex(code), rip=env.first_rip, system=env.system, **changes
    )


def outcome_of(case, leaf="00", **changes):
    fields = {
        "gpr": case.gpr,
        "rip": case.rip + 2,
        "rflags": 2,
        "system": case.system,
        "leaf": leaf,
        "length": 2,
    }
    return Outcome(case.id, **{**fields, **changes})


def pair(leaf="00", code="00c0", mode="prot32", **changes):
    case = case_of(code, mode)
    return case, outcome_of(case, leaf), outcome_of(case, leaf="", **changes)


def kinds(case, a, b):
    return {d.kind for d in compare(case, a, b)}


def test_equal_outcomes_agree():
    case, a, b = pair()
    assert agree(a, b)
    assert compare(case, a, b) == ()
    assert judge(case, a, b, Silent()).kind == AGREE


@pytest.mark.parametrize(
    ("changes", "kind", "field"),
    [
        ({"gpr": (0, 0, 0, 5, *(0,) * 12)}, "gpr", "rbx"),
        ({"rip": 1}, "rip", "rip"),
        ({"rflags": 3}, "rflags", "rflags"),
        ({"pages": {8: b"x" + ZERO_PAGE[1:]}}, "memory", "mem"),
    ],
)
def test_each_field_is_compared(changes, kind, field):
    case, a, b = pair(**changes)
    assert not agree(a, b)
    (difference,) = compare(case, a, b)
    assert (difference.kind, difference.field) == (kind, field)
    assert judge(case, a, b, Silent()).kind == FINDING


@pytest.mark.parametrize("change", [{"cr2": 1}, {"efer": 1 << 11}, {"xcr0": 7}, {"cr4": 0x2000}])
def test_system_fields_are_compared(change):
    case, a, b = pair()
    b.system = msgspec.structs.replace(case.system, **change)
    (difference,) = compare(case, a, b)
    assert difference.field in change


def test_members_of_segments_debug_registers_and_fpu_are_named():
    case, a, b = pair()
    system = case.system
    seg = (*system.seg[:2], msgspec.structs.replace(system.seg[2], sel=1), *system.seg[3:])
    fpu = msgspec.structs.replace(system.fpu, xmm=(0, 9, *(0,) * 14), ftw=255)
    b.system = msgspec.structs.replace(system, seg=seg, dr=(1, *system.dr[1:]), fpu=fpu)
    assert {d.field for d in compare(case, a, b)} == {"seg.ss", "dr0", "fpu.ftw", "fpu.xmm1"}


def test_an_equal_system_that_is_another_object_agrees():
    case, a, b = pair()
    b.system = msgspec.structs.replace(case.system)
    assert b.system is not a.system
    assert agree(a, b)


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (None, PF, "fault-missing"),
        (PF, None, "fault-extra"),
        (PF, (13, 0, None), "fault-vector"),
        (PF, (14, 6, 0x8000), "fault-error-code"),
        (PF, (14, 2, 0x9000), "fault-address"),
    ],
)
def test_faults_are_compared(ours, theirs, kind):
    case = case_of()
    sides = [
        outcome_of(case, exception=fault, rc="propagate_fault" if fault else "continue")
        for fault in (ours, theirs)
    ]
    assert not agree(*sides)
    assert kinds(case, *sides) == {kind}


def test_error_codes_count_in_real_mode_too():
    """None is pushed there, but both sides define one at this level, before delivery."""
    case = case_of(mode="real")
    a = outcome_of(case, exception=(14, 2, 0x9000), rc="propagate_fault")
    b = outcome_of(case, exception=(14, 0, 0x9000), rc="propagate_fault")
    assert kinds(case, a, b) == {"fault-error-code"}


def test_a_missing_fault_hides_what_follows_from_it():
    case, a, b = pair(exception=PF, rc="propagate_fault", rip=0, gpr=(1,) * 16)
    assert kinds(case, a, b) == {"fault-missing"}


def test_always_undefined_flags_are_ignored():
    _, a, b = pair("20", "20c0", rflags=2 | X86_EFLAGS_AF)
    assert agree(a, b)


def test_defined_flags_of_the_same_leaf_are_not():
    case, a, b = pair("20", "20c0", rflags=2 | X86_EFLAGS_AF | X86_EFLAGS_SF)
    assert not agree(a, b)
    (difference,) = compare(case, a, b)
    assert (difference.subject, difference.oracle) == ("-", "SF")


def test_undefined_flags_count_when_the_instruction_faulted():
    case = case_of("20c0")
    a = outcome_of(case, "20", exception=PF, rc="propagate_fault")
    b = outcome_of(case, "20", exception=PF, rc="propagate_fault", rflags=2 | X86_EFLAGS_AF)
    assert not agree(a, b)
    assert kinds(case, a, b) == {"rflags"}


@pytest.mark.parametrize(
    ("code", "leaf", "count", "undefined"),
    [
        ("d3e0", "d3/4", 0, 0),
        ("d3e0", "d3/4", 1, X86_EFLAGS_AF),
        ("d3e0", "d3/4", 5, X86_EFLAGS_AF | X86_EFLAGS_OF),
        ("d2e0", "d2/4", 9, X86_EFLAGS_AF | X86_EFLAGS_OF | X86_EFLAGS_CF),
        ("d1e0", "d1/4", 9, X86_EFLAGS_AF),
    ],
)
def test_undefined_flags_of_shifts_depend_on_the_count(code, leaf, count, undefined):
    case = case_of(code, gpr=(0, count, *(0,) * 14))
    assert undefined_now(case, outcome_of(case, leaf)) == undefined


def test_the_count_of_an_immediate_shift_is_its_last_byte():
    case = case_of("c1e000")
    assert undefined_now(case, outcome_of(case, "c1/4", length=3)) == 0
    case = case_of("c1e002")
    assert undefined_now(case, outcome_of(case, "c1/4", length=3)) == X86_EFLAGS_AF | X86_EFLAGS_OF


def test_the_destination_of_bsf_of_zero_is_undefined_and_no_other():
    case, a, b = pair("0fbc", "0fbcc1", gpr=(7, *(0,) * 15), rflags=2 | X86_EFLAGS_ZF)
    a.rflags |= X86_EFLAGS_ZF
    assert compare(case, a, b) == ()
    b.gpr = (7, 0, 0, 1, *(0,) * 12)
    assert {d.field for d in compare(case, a, b)} == {"rbx"}


def test_the_destination_of_bsf_counts_when_the_source_is_not_zero():
    case, a, b = pair("0fbc", "0fbcc1", gpr=(7, *(0,) * 15))
    assert {d.field for d in compare(case, a, b)} == {"rax"}


def test_memory_differences_carry_their_address():
    page = ZERO_PAGE[:100] + b"\x01" + ZERO_PAGE[101:]
    case, a, b = pair(pages={8: page})
    (difference,) = compare(case, a, b)
    assert difference.at == 0x8064


def test_a_page_rewritten_with_its_contents_is_no_difference():
    case, a, b = pair(pages={8: ZERO_PAGE})
    assert not agree(a, b)
    assert judge(case, a, b, Silent()).kind == AGREE


@pytest.mark.parametrize(
    ("gaps", "reason"),
    [
        ((("all", "g1"),), "g1"),
        ((("gpr", "g2"), ("rflags", "g3")), "g2+g3"),
        ((("rbx", "g4"), ("rflags", "g4")), "g4"),
    ],
)
def test_gaps_that_cover_every_difference_skip_the_case(gaps, reason):
    case, a, b = pair(gpr=(0, 0, 0, 5, *(0,) * 12), rflags=2 | X86_EFLAGS_CF)
    verdict = judge(case, a, b, Silent(*gaps))
    assert (verdict.kind, verdict.reason) == (SKIPPED, reason)


@pytest.mark.parametrize("gaps", [(), (("rflags", "g"),), (("mem", "g"), ("rcx", "g"))])
def test_one_uncovered_difference_makes_a_finding(gaps):
    case, a, b = pair(gpr=(0, 0, 0, 5, *(0,) * 12), rflags=2 | X86_EFLAGS_CF)
    assert judge(case, a, b, Silent(*gaps)).kind == FINDING


def test_a_gap_of_a_field_covers_its_parts_only():
    case = case_of()
    a = outcome_of(case, exception=PF, rc="propagate_fault")
    b = outcome_of(case, exception=(14, 6, 0x8000), rc="propagate_fault")
    assert judge(case, a, b, Silent(("exception.error_code", "g"))).kind == SKIPPED
    assert judge(case, a, b, Silent(("exception", "g"))).kind == SKIPPED
    assert judge(case, a, b, Silent(("exception.address", "g"))).kind == FINDING


def test_a_refusal_is_skipped_with_its_reason():
    case, a, b = pair()
    a.rc, a.reason = "unhandleable", "because"
    assert refusal(a) == "subject-unhandleable: because"
    assert judge(case, a, b, Silent()).kind == SKIPPED


def test_a_crash_is_a_finding_whatever_the_oracle_says():
    case, a, b = pair()
    a.crash = "boom"
    verdict = judge(case, a, b, Silent(("all", "g")))
    assert verdict.kind == FINDING
    assert primary_kind(verdict.differences) == "crash"


def test_the_weightiest_kind_names_the_bucket():
    case, a, b = pair(gpr=(1,) * 16, rip=9, rflags=3)
    assert primary_kind(compare(case, a, b)) == "rip"
    assert kinds(case, a, b) <= set(KINDS)


def test_the_fast_path_is_fast():
    _, a, b = pair("d3/4", "d3e0")
    best = min(timeit.repeat(lambda: agree(a, b), number=2000, repeat=5)) / 2000
    assert best < 5e-6  # about 0.5 us on an idle machine


def test_a_missing_interrupt_shadow_is_a_difference():
    case = generate_batch(1, 0, 1)[0]
    ours = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system)
    theirs = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, interruptibility=2)
    assert not agree(ours, theirs)
    assert [(d.field, d.subject, d.oracle) for d in compare(case, ours, theirs)] == [
        ("interruptibility", "0", "2")
    ]
