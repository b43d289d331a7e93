"""Task switches by the SDM: what is saved, loaded, marked and checked, and what KVM makes of it."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_DS, VCPU_SREG_FS, VCPU_SREG_LDTR, VCPU_SREG_TR
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import TableRegister
from emufuzz.fuzz.engines import SUBJECTS
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.exit_rules import task_state
from emufuzz.oracle.exits import ExitsOracle
from emufuzz.oracle.exits.run import NoExitError
from tests.unit.oracle.exits.tasks import (
    ABSENT,
    BUSY32,
    CALL,
    CODE,
    CODE3,
    CR3,
    FLAGS,
    FREE16,
    FREE32,
    GATE,
    GDT,
    GOOD,
    IRET,
    JMP,
    LDT,
    NEW32,
    OLD,
    OLD_TR,
    REGS,
    RIP,
    STACK,
    TABLE,
    memory,
    task_case,
)  # fmt: skip

NT, TF, VM, TS = 0x4000, 0x100, 0x20000, 8
TS_FAULT, NP_FAULT, SS_FAULT = 10, 11, 12
VALID = 1 << 31


@pytest.fixture(scope="module")
def exits():
    return ExitsOracle()


def run(exits, case):
    exits.check(case)
    (outcome,) = exits.run([case])
    return outcome


def busy(case, outcome, selector):
    return bool(memory(case, outcome, GDT + selector + 5, 1) & 2)


def test_the_new_task_has_the_registers_of_its_tss(exits):
    outcome = run(exits, task_case(CALL | FREE32))
    assert (outcome.rip, outcome.rflags, outcome.gpr[:8]) == (RIP, FLAGS | NT, REGS)
    assert outcome.system.seg[VCPU_SREG_CS].sel == CODE
    assert outcome.system.seg[VCPU_SREG_DS].sel == STACK
    assert not outcome.system.seg[VCPU_SREG_FS].p
    assert (outcome.system.seg[VCPU_SREG_TR].sel, outcome.system.seg[VCPU_SREG_TR].type) == (FREE32, 11)
    assert outcome.system.cr0 & TS
    assert outcome.system.cr3 == CR3
    assert outcome.exception is None


def test_the_old_task_is_saved_behind_its_instruction(exits):
    case = task_case(JMP | FREE32)
    outcome = run(exits, case)
    assert memory(case, outcome, OLD + 0x20, 4) == case.rip + 2
    assert memory(case, outcome, OLD + 0x24, 4) == case.rflags
    assert memory(case, outcome, OLD + 0x28, 4) == 0x11
    assert memory(case, outcome, OLD + 0x44, 4) == 0x77
    assert memory(case, outcome, OLD + 0x4C, 4) == case.system.seg[VCPU_SREG_CS].sel
    assert memory(case, outcome, OLD + 0x60, 4) == 0  # LDTR is static


def test_a_16_bit_task_is_saved_in_its_own_format(exits):
    case = task_case(JMP | FREE32, old_type=3)
    outcome = run(exits, case)
    assert memory(case, outcome, OLD + 0x0E, 2) == case.rip + 2
    assert memory(case, outcome, OLD + 0x12, 2) == 0x11
    assert memory(case, outcome, OLD + 0x2A, 2) == 0


# fmt: off
#: Why -> selector of the new task; whether the old and the new task are busy, back link and NT are set.
REASONS = {
    "call": (CALL | FREE32, True,  True, OLD_TR, NT),
    "jmp":  (JMP | FREE32,  False, True, 0x99,   0),
    "iret": (IRET | BUSY32, False, True, 0x99,   0),
    "gate": (GATE | FREE32, True,  True, OLD_TR, NT),
}
# fmt: on


@pytest.mark.parametrize("reason", REASONS)
def test_busy_bits_link_and_nt_depend_on_the_reason(exits, reason):
    qualification, old, new, link, nested = REASONS[reason]
    event = {"vectoring_info": VALID | 0x20} if reason == "gate" else {}
    case = task_case(qualification, rflags=NT if reason == "iret" else 0, **event)
    outcome = run(exits, case)
    assert busy(case, outcome, OLD_TR) == old
    assert busy(case, outcome, qualification & 0xFFFF) == new
    assert memory(case, outcome, NEW32, 2) == link
    assert outcome.rflags & NT == nested
    assert not memory(case, outcome, OLD + 0x24, 4) & NT


def test_an_event_of_hardware_comes_back_to_the_instruction(exits):
    case = task_case(GATE | FREE32, vectoring_info=VALID | 0x20)
    assert memory(case, run(exits, case), OLD + 0x20, 4) == case.rip


def test_the_error_code_is_pushed_onto_the_new_stack(exits):
    info = VALID | 3 << 8 | 1 << 11 | 13
    case = task_case(GATE | FREE32, vectoring_info=info, vectoring_error_code=0x1C)
    outcome = run(exits, case)
    assert outcome.gpr[4] == REGS[4] - 4
    assert memory(case, outcome, REGS[4] - 4, 4) == 0x1C


def test_the_trap_bit_is_a_debug_exception_in_the_new_task(exits):
    assert run(exits, task_case(JMP | FREE32, trap=1)).exception == (1, None, None)


def test_a_virtual_8086_task_has_paragraphs(exits):
    outcome = run(exits, task_case(JMP | FREE32, selectors=(0x100,) * 6, flags=FLAGS | VM))
    assert {segment.base for segment in outcome.system.seg[:6]} == {0x1000}
    assert {segment.dpl for segment in outcome.system.seg[:6]} == {3}


def test_descriptors_may_be_in_the_ldt_of_the_new_task(exits):
    outcome = run(exits, task_case(JMP | FREE32, ldt=TABLE))
    table = outcome.system.seg[VCPU_SREG_LDTR]
    assert (table.sel, table.base, table.limit) == (TABLE, LDT, 0x7F)


def test_what_the_sdm_leaves_undefined_is_not_vouched_for(exits):
    """CR3 without paging; RFLAGS above 16 bits and upper halves of a 16-bit task."""
    assert ("cr3", "exits-undefined") in run(exits, task_case(JMP | FREE32)).unchecked
    outcome = run(exits, task_case(JMP | FREE16, rflags=0x40000))
    assert ("rflags", "exits-undefined") in outcome.unchecked
    assert [value >> 16 for value in outcome.gpr[:8]] == [0xFFFF] * 8


def test_what_waits_beside_the_switch_is_left_open(exits):
    outcome = run(exits, task_case(JMP | FREE32, pending={"vector": 13, "error_code": 0}))
    assert ("exception", "exits-open") in outcome.unchecked


# fmt: off
#: Selectors ES CS SS DS FS GS, LDTR, and the exception that the new task has.
REFUSED = {
    "null cs":             ((STACK, 0, STACK, STACK, 0, 0),             0,      (TS_FAULT, 0)),
    "null ss":             ((STACK, CODE, 0, STACK, 0, 0),              0,      (TS_FAULT, 0)),
    "data in cs":          ((STACK, STACK, STACK, STACK, 0, 0),         0,      (TS_FAULT, STACK)),
    "code in ss":          ((STACK, CODE, CODE, STACK, 0, 0),           0,      (TS_FAULT, CODE)),
    "cs of another level": ((STACK, CODE3, STACK, STACK, 0, 0),         0,      (TS_FAULT, CODE3)),
    "beyond the table":    ((STACK, CODE, STACK, 0x200, 0, 0),          0,      (TS_FAULT, 0x200)),
    "a tss in ds":         ((STACK, CODE, STACK, FREE32, 0, 0),         0,      (TS_FAULT, FREE32)),
    "no ldt":              ((0, CODE, STACK, 4, 0, 0),                  0,      (TS_FAULT, 4)),
    "absent ds":           ((STACK, CODE, STACK, ABSENT, 0, 0),         0,      (NP_FAULT, ABSENT)),
    "absent ss":           ((STACK, CODE, ABSENT, STACK, 0, 0),         0,      (SS_FAULT, ABSENT)),
    "ldtr is a tss":       (GOOD,                                       FREE32, (TS_FAULT, FREE32)),
    "ldtr in the ldt":     (GOOD,                                       0xC,    (TS_FAULT, 0xC)),
}
# fmt: on


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_selector_is_an_exception_of_the_new_task(exits, name):
    """SDM Vol. 3A Table 7-1."""
    selectors, ldt, fault = REFUSED[name]
    outcome = run(exits, task_case(JMP | FREE32, selectors=selectors, ldt=ldt))
    assert outcome.exception == (*fault, None)
    assert (outcome.rip, outcome.gpr[:8]) == (RIP, REGS)
    assert ("seg.es", "exits-undefined") in outcome.unchecked
    assert "rip" not in {field for field, _ in outcome.unchecked}


def test_of_two_exceptions_it_is_not_defined_which_one_comes(exits):
    outcome = run(exits, task_case(JMP | FREE32, selectors=(STACK, CODE, STACK, ABSENT, FREE32, 0)))
    assert outcome.exception is not None
    assert {("exception", "exits-undefined"), ("exception.error_code", "exits-undefined")} <= set(
        outcome.unchecked
    )


# fmt: off
#: Qualification and event -> hardware faults before it exits.
BEFORE = {
    "null":               (JMP | 0, {}),
    "local":              (JMP | 0xC, {}),
    "beyond the table":   (JMP | 0x200, {}),
    "busy":               (JMP | BUSY32, {}),
    "not busy":           (IRET | FREE32, {}),
    "no tss":             (JMP | CODE, {}),
    "an ldt":             (CALL | TABLE, {}),
    "gate without event": (GATE | FREE32, {}),
}
# fmt: on


@pytest.mark.parametrize("name", BEFORE)
def test_what_hardware_refuses_never_exits(exits, name):
    qualification, event = BEFORE[name]
    with pytest.raises(NoExitError, match=r"^kvm\.(exit_qualification|vectoring_info): "):
        exits.check(task_case(qualification, **event))


def test_a_software_interrupt_needs_its_gate(exits):
    case = task_case(GATE | FREE32, vectoring_info=VALID | 4 << 8 | 0x80)
    exits.check(case)
    short = msgspec.structs.replace(case.system, idtr=TableRegister(0x3000, 0x3FF))
    with pytest.raises(NoExitError, match="there is no gate"):
        exits.check(msgspec.structs.replace(case, system=short))


def test_a_stepped_guest_that_steps_itself_is_not_taken(exits):
    with pytest.raises(UnsupportedCaseError, match=r"^kvm\.guest_debug: "):
        exits.check(task_case(JMP | FREE32, rflags=TF, guest_debug=3))
    exits.check(task_case(JMP | FREE32, guest_debug=3))


# What KVM makes of it


@pytest.fixture(scope="module")
def subject():
    return SUBJECTS["kvm"]()


def verdict(exits, subject, case, damage=None):
    (ours,), (theirs,) = subject.run([case]), exits.run([case])
    assert not ours.crash
    if damage is not None:
        damage(ours)
    return judge(case, ours, theirs, exits)


def test_kvm_agrees_where_it_has_no_ways_of_its_own(exits, subject):
    for qualification in (JMP | FREE32, CALL | FREE32, IRET | BUSY32):
        assert verdict(exits, subject, task_case(qualification)).kind == AGREE


# fmt: off
#: Each way of KVM's (emufuzz.oracle.exits.task.Way).
WAYS = {
    "old format":      task_case(JMP | FREE32, old_type=3),
    "upper halves":    task_case(JMP | FREE16),
    "no trap bit":     task_case(JMP | FREE32, trap=1),
    "lost exception":  task_case(CALL | FREE32, selectors=(STACK, CODE, STACK, ABSENT, 0, 0)),
    "lost, 16 bits":   task_case(JMP | FREE16, selectors=(STACK, CODE, STACK, 0x200, 0, 0)),
    "lost, ldtr":      task_case(CALL | FREE32, ldt=FREE32),
    "upper halves, stepped": task_case(JMP | FREE16, flags=FLAGS | 0x100, guest_debug=3),
}
# fmt: on


@pytest.mark.parametrize("name", WAYS)
def test_kvms_ways_have_a_name(exits, subject, name):
    found = verdict(exits, subject, WAYS[name])
    assert (found.kind, found.reason) == (SKIPPED, "kvm-task-state"), found.differences


def flip_register(outcome):
    outcome.gpr = (outcome.gpr[0] ^ 1, *outcome.gpr[1:])


def flip_memory(outcome):
    page = outcome.pages[OLD >> 12]
    outcome.pages = {**outcome.pages, OLD >> 12: page[:0x800] + b"\x01" + page[0x801:]}


def move_on(outcome):
    outcome.rip += 1


@pytest.mark.parametrize("damage", [flip_register, flip_memory, move_on])
@pytest.mark.parametrize("name", WAYS)
def test_kvms_ways_excuse_nothing_else(exits, subject, name, damage):
    assert verdict(exits, subject, WAYS[name], damage).kind == FINDING


@pytest.mark.parametrize("damage", [flip_register, flip_memory, move_on])
def test_what_waits_beside_a_switch_of_kvms_is_left_open(subject, damage):
    """A single-step trap is queued: the rule is about the rest."""
    case = task_case(JMP | FREE16, pending={"vector": 1, "payload": 0x4000})
    (ours,) = subject.run([case])
    assert ours.exception == (1, None, None)
    assert task_state(case, ours, ours, ())
    damage(ours)
    assert not task_state(case, ours, ours, ())
    elsewhere = task_case(JMP | FREE16)
    (ours,) = subject.run([elsewhere])
    ours.exception = (1, None, None)
    assert not task_state(elsewhere, ours, ours, ())


def test_where_only_kvm_gets_to_the_end_anything_else_is_wrong(exits, subject):
    """The old TSS of 16 bits is too short for its own format; KVM saves in that of the new one."""
    case = short_task()
    (ours,), (theirs,) = subject.run([case]), exits.run([case])
    assert "all" not in {field for field, _ in theirs.unchecked}
    assert judge(case, ours, theirs, exits)[:2] == (SKIPPED, "kvm-task-state")
    for damage in (flip_register, move_on):
        (wrong,) = subject.run([case])
        damage(wrong)
        assert judge(case, wrong, theirs, exits).kind == FINDING


def short_task():
    """From a TSS of 32 bits whose limit is that of 16 bits, to one of 16 bits."""
    case = task_case(JMP | FREE16)
    seg = list(case.system.seg)
    seg[VCPU_SREG_TR] = msgspec.structs.replace(seg[VCPU_SREG_TR], limit=0x2B)
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg)))
