"""The rules as an oracle: what it determines, what it leaves open, how violations read."""

from __future__ import annotations

import msgspec
import pytest
from support.machine_cases import entry_places

from emufuzz.arch.regs import VCPU_SREG_TR
from emufuzz.case.build import DATA_BASE, build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Memory, Outcome
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.compare import KINDS, Difference
from emufuzz.oracle.quirks import explaining_quirk
from emufuzz.oracle.rules import RULES, RulesOracle, Violation
from emufuzz.subject.flat import FlatSubject
from tests.unit.oracle.rules.samples import GP0, UD, case_of, outcome_of

ORACLE = RulesOracle()


def test_it_says_what_it_is():
    assert ORACLE.name == "rules"
    assert ORACLE.fingerprint() == {"oracle": "rules", "rules": str(len(RULES))}
    assert ORACLE.capabilities == Capabilities(physical=True, devices=True, paths=True)
    assert ORACLE.ledger == ()
    ORACLE.close()


def test_a_fault_that_is_due_is_determined():
    case = case_of("prot32", "f4", cpl=3)
    (outcome,) = ORACLE.run([case])
    assert (outcome.rc, outcome.exception) == ("propagate_fault", GP0)
    assert (outcome.gpr, outcome.rip, outcome.system) == (case.gpr, case.rip, case.system)
    assert outcome.unchecked == ORACLE.unchecked(case, outcome)
    assert {field for field, _ in outcome.unchecked} == {"mem", "rflags", "device_trace"}


def test_nothing_is_said_of_what_completes():
    (outcome,) = ORACLE.run([case_of("prot32", "90")])
    assert outcome.exception is None
    assert outcome.unchecked == (("all", "rules-undetermined"),)


def test_a_choice_between_two_faults_is_none():
    case = case_of("prot32", "f7f3", rbx=0)
    assert ORACLE.run([case])[0].exception == (0, None, None)
    both = case_of("prot32", "a5", rsi=0xB000, rdi=0xD000)  # either operand may be looked at first
    assert ORACLE.run([both])[0].unchecked == (("all", "rules-undetermined"),)
    for fault in ((14, 0, 0xB000), (14, 2, 0xD000)):
        assert ORACLE.review(both, outcome_of(both, exception=fault)) == ()
    assert ORACLE.review(both, outcome_of(both)) != ()


def test_the_earlier_phase_comes_first():
    case = case_of("prot32", "0f22c8", cpl=3)  # no such register, and not at this privilege
    assert ORACLE.review(case, outcome_of(case, exception=UD)) == ()
    (violation,) = ORACLE.review(case, outcome_of(case, exception=GP0))
    assert violation == Violation(
        "ud-control-register", "exception",
        "#UD: CR0, CR2, CR3, CR4 and CR8 are all that there are", "#GP(0x0)",
    )  # fmt: skip


def test_what_goes_on_instead_of_faulting_is_one_violation():
    case = case_of("prot32", "f4", cpl=3)
    wrong = outcome_of(case, rax=5, rflags=0, interruptibility=1)
    assert [violation.rule for violation in ORACLE.review(case, wrong)] == ["gp-cpl-hlt"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 2}, "count: rules are about one instruction, got 2"),
        ({"emul_type": 1}, "emul_type: it means something to KVM only"),
        ({"path": "task-switch"}, "path: task-switch"),
        ({"extra": {"kvm": {"exit_qualification": 1}}}, "kvm.exit_qualification: the exit need not be"),
    ],
)
def test_cases_that_are_not_one_instruction_are_refused(changes, message):
    case = msgspec.structs.replace(case_of("prot32", "f4", cpl=3), **changes)
    with pytest.raises(UnsupportedCaseError, match=message):
        ORACLE.check(case)
    assert ORACLE.review(case, outcome_of(case)) == ()


@pytest.mark.parametrize("changes", [{"crash": "x"}, {"hang": True}, {"rc": "unhandleable"}])
def test_outcomes_that_are_no_states_are_not_reviewed(changes):
    case = case_of("prot32", "f4", cpl=3)
    assert ORACLE.review(case, msgspec.structs.replace(outcome_of(case), **changes)) == ()


@pytest.mark.parametrize(
    ("code", "changes", "field", "kind"),
    [
        ("f4", {}, "exception", "fault-missing"),
        ("f4", {"exception": UD}, "exception", "fault-vector"),
        ("f4", {"exception": (13, 8, None)}, "exception.error_code", "fault-error-code"),
        ("90", {"exception": UD}, "exception", "fault-extra"),
        ("90", {"rax": 5}, "rax", "gpr"),
        ("90", {"rip": 0}, "rip", "rip"),
        ("90", {"rflags": 0}, "rflags", "rflags"),
        ("90", {"mem": {DATA_BASE: b"x"}}, "mem", "memory"),
        ("90", {"cr3": 1}, "cr3", "system"),
        ("90", {"events": [("in", 1, 1)]}, "device_trace", "device-trace"),
    ],
)
def test_violations_are_differences(code, changes, field, kind):
    case = case_of("prot32", code, cpl=3)
    found = ORACLE.differences(case, outcome_of(case, **changes))
    assert [(d.field, d.kind) for d in found if d.field == field][0] == (field, kind)  # noqa: RUF015 - one at least
    assert all(isinstance(d, Difference) and d.kind in KINDS for d in found)


def test_a_known_quirk_explains_the_difference():
    case = case_of("vm86", "9c")  # PUSHF below IOPL 3
    (subject,) = FlatSubject().run([case])
    (judged,) = ORACLE.run([case])
    differences = ORACLE.differences(case, subject)
    assert [d.kind for d in differences] == ["fault-missing"]
    assert explaining_quirk(case, subject, judged, differences) == "kvm-quirk-20-vm86-pushf-popf"


def test_a_breakpoint_comes_before_the_instruction():
    case = case_of("prot32", "f4", cpl=3, path="invalid-guest-state")
    stopped = outcome_of(case, exception=(1, None, None), rc="continue")
    assert ORACLE.review(case, stopped) == ()


def test_a_device_may_be_compared_with_itself():
    device = {"devices": [{"kind": "mmio", "addr": "0x20000", "size": 8}]}
    case = case_of("prot32", "a6", rsi=0x20000, rdi=0x20000, path="ept-misconfig", extra=device)
    read = {"kind": "mmio", "addr": "0x20000", "size": 1, "direction": "read", "data": "00"}
    changes = {"rsi": 0x20001, "rdi": 0x20001, "rflags": 0x46}
    twice = outcome_of(case, extra={"device_trace": [read] * 2}, **changes)
    thrice = outcome_of(case, extra={"device_trace": [read] * 3}, **changes)
    assert ORACLE.review(case, twice) == ()
    assert [v.rule for v in ORACLE.review(case, thrice)] == ["device-read-once"]


def test_a_call_may_look_at_its_target_or_its_stack_first():
    case = case_of("prot64", "ffd0", rax=1 << 47, rsp=0xE000)
    for fault in (GP0, (14, 2, 0xDFF8)):
        assert ORACLE.review(case, outcome_of(case, exception=fault)) == ()
    fine = case_of("prot64", "ffd0", rax=0x6000, rsp=0xE000)
    (violation,) = ORACLE.review(fine, outcome_of(fine, exception=GP0))
    assert violation.rule == "pf-data"


def test_a_bitmap_that_is_not_there_may_fault_before_the_operand():
    case = case_of("prot64", "6c", cpl=3, rdi=0xB000, mem=Memory())
    task = case.system.seg[VCPU_SREG_TR]
    own, operand = (14, 0, task.base + 102), (14, 6, 0xB000)
    for fault in (own, operand, GP0):
        assert ORACLE.review(case, outcome_of(case, exception=fault)) == ()
    for fault in ((14, 4, task.base + 102), (14, 0, task.base + task.limit + 1)):
        (violation,) = ORACLE.review(case, outcome_of(case, exception=fault))
        assert violation.rule == "pf-data"


def test_of_code_behind_page_tables_that_lead_nowhere_nothing_is_known():
    """The directory pointer of the code's page is where no memory is: a fetch may be #PF."""
    case = build_case("prot64", b"\xc7\x4e", physical=True)
    place = entry_places(case, 0x6000)[0][0]
    beyond = {"addr": hex(place), "data": (0x200101027).to_bytes(8, "little").hex()}
    lost = msgspec.structs.replace(case, extra={"phys": [*case.extra["phys"], beyond]})
    fault = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, rc="propagate_fault")
    fault.exception = (14, 16, 0x6000)
    assert not ORACLE.differences(lost, fault)
    assert [difference.field for difference in ORACLE.differences(case, fault)] == ["exception"]


def test_a_call_through_a_device_may_be_refused_before_it_pushes():
    """Nobody knows where it leads; the stack is absent."""
    device = {"kind": "mmio", "addr": "0xb000", "size": 8}
    case = build_case("prot32", b"\xff\x16", rsi=0xB000, rsp=0xE002)
    case = msgspec.structs.replace(case, path="io-completion", extra={"devices": [device]})
    fault = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, rc="propagate_fault")
    fault.exception = (13, 0, None)
    assert not ORACLE.differences(case, fault)
    fault.exception = (6, None, None)
    assert [difference.field for difference in ORACLE.differences(case, fault)] == ["exception"]


@pytest.mark.parametrize(("flags", "broken"), [(2, False), (0, True)])
def test_what_is_stored_in_a_read_only_slot_is_not_in_memory(flags, broken):
    """SMSW: userspace gets the write. In a slot that can be written to it must be there."""
    case = build_case("prot64", b"\x0f\x01\x26", rsi=0x8000)
    slots = [{"base": place, "size": 0x1000, "flags": flags} for place in (0x6000, 0x8000)]
    case = msgspec.structs.replace(case, path="ept-violation", extra={"kvm": {"memslots": slots}})
    written = {"kind": "mmio", "addr": "0x8000", "size": 2, "direction": "write", "data": "3300"}
    outcome = Outcome(case.id, case.gpr, case.rip + 3, case.rflags, case.system)
    outcome.extra = {"device_trace": [written]}
    assert ([d.field for d in ORACLE.differences(case, outcome)] == ["mem"]) == broken


@pytest.mark.parametrize(("base", "judged"), [(0x6000, True), (0x9000, False)])
def test_of_code_that_is_in_no_slot_nothing_is_known(base, judged):
    case = build_case("prot32", b"\x89\xd8")
    extra = {"kvm": {"memslots": [{"base": base, "size": 0x1000, "flags": 0}]}}
    case = msgspec.structs.replace(case, path="shadow-pf", extra=extra)
    outcome = Outcome(case.id, case.gpr, case.rip, case.rflags, case.system, rc="propagate_fault")
    outcome.exception = UD
    assert bool(ORACLE.differences(case, outcome)) == judged
