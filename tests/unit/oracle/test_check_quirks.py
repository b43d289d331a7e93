"""Quirks that only checking oracles see are recognised, and another fault beside them is still reported."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.model import Memory, Outcome
from emufuzz.fuzz.environments import environments
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.panel import Panel
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, compare
from emufuzz.oracle.quirks import CHECK_QUIRKS, MACHINE_QUIRKS, QUIRKS, explaining_quirk
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

IF = 0x200
PAGE, END = 0x8000, 0x9000
HIGH = 0x8000_0000_0000
ABSENT = 0xA000
GP0, SS0, UD = (13, 0, None), (12, 0, None), (6, None, None)
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


@pytest.fixture(scope="module")
def panel():
    return Panel(UnicornOracle(), [RulesOracle()])


@pytest.fixture(scope="module")
def subject():
    return FlatSubject(events=False)


def case_of(name, code, *entries, flags=2, **gpr):
    mode = name.partition("-")[0]
    env = next(e for e in environments(1, mode) if e.name == name)
    registers = [0] * 16
    for register, value in gpr.items():
        registers[REGISTERS.index(register)] = value
    return msgspec.structs.replace(
        generate_batch(1, 0, 1)[0],
        mode=mode,
        code=bytes.fromhex(code) + b"\xf4",
        rip=env.first_rip,
        rflags=flags,
        gpr=tuple(registers),
        system=env.system,
        mem=Memory(((PAGE, b"\x11" * 64), *entries)),
    )


def based(case, number, **changes):
    """The case with another segment."""
    seg = list(case.system.seg)
    seg[number] = msgspec.structs.replace(seg[number], **changes)
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=tuple(seg)))


LONG, SHORT, USER = "prot64-cpl0-flat", "prot32-cpl0-flat", "prot32-cpl3-flat"
# fmt: off
#: What the rules object to.
BY_RULES = {
    "kvm-quirk-18-sti-shadow":        case_of(LONG, "fb", flags=IF | 2),
    "kvm-quirk-30-privilege-first":   case_of(USER, "0f20e9"),
    "kvm-quirk-72-read-before-check":    based(case_of(SHORT, "2e0108", rax=END), 1, type=11),
    "kvm-quirk-05-null-override":     based(case_of(LONG, "643e0108", rax=PAGE, rcx=3), 4, base=0x1000),
    "kvm-quirk-71-movnti-prefix":              case_of(LONG, "660fc308", rax=PAGE, rcx=0x12345678),
    "kvm-quirk-71-ignored-prefix":             case_of(SHORT, "660fae08", rax=PAGE + 0x800),
    "kvm-quirk-14-stored-selector":   case_of(LONG, "488c18", rax=PAGE),
    "kvm-quirk-73-mmx-tags":          case_of(LONG, "0f7f00", rax=END),
    "kvm-quirk-42-movsxd-16":         case_of(LONG, "666308", rax=END - 2),
    "kvm-quirk-44-short-image":       case_of(SHORT, "0fae00", rax=END - 0x140),
    "kvm-quirk-07-scan-of-zero":      case_of(LONG, "f30fbdc1", rax=1 << 40),
    "kvm-quirk-43-limit-first":       based(case_of(SHORT, "0f0110", rax=0x1000), 3, base=PAGE, limit=0x1003),
    "kvm-quirk-31-control-register-bits": case_of(LONG, "0f22e0", rax=1 << 32 | 0x6A0),
    "kvm-quirk-32-debug-register-alias": case_of(LONG, "0f23e0", rax=1 << 32),
}
#: What a processor does instead: its exception, and the registers that it has changed.
BY_PROCESSOR = {
    "kvm-quirk-02-wrap":              (case_of(USER, "8b06", rsi=0xFFFFFFFE), GP0, {}),
    "kvm-quirk-02-above-4g":          (case_of(SHORT, "0fae08", (0xFFFFF000, b""), rax=0xFFFFFFE0), None, {}),
    "kvm-quirk-05-stack-override":    (case_of(LONG, "368b00", rax=HIGH), GP0, {}),
    "kvm-cmps-order":                 (case_of(LONG, "a6", rsi=END, rdi=ABSENT), (14, 0, ABSENT), {}),
    "kvm-quirk-70-cmpxchg-upper":     (case_of(LONG, "0fb1d6", rsi=HIGH | 7), None,
                                       {"rsi": HIGH | 7, "rax": 7}),
    "kvm-popa-skips":                 (case_of(SHORT, "61", rsp=END - 15), (14, 0, END), {}),
    "kvm-vmcb-address-first":         (case_of(LONG, "0f01da", rax=1 << 48), UD, {}),
    "kvm-quirk-22-69-real-interrupt": (case_of("real-cpl0-flat", "ce", (0xC000, b""), flags=0x802, rsp=99),
                                       (14, 0, 0x10), {}),
    "kvm-unreadable-bitmap":          (case_of(USER, "ec"), (14, 0, 0x1866), {}),
    "kvm-quirk-48-lost-batch":        (case_of(SHORT, "f36d", rdi=END - 8, rcx=5), (14, 2, END),
                                       {"rdi": END, "rcx": 3}),
}
#: Quirks that others explain first where an oracle sees them, by another rule.
ALSO = {"kvm-quirk-14-stored-selector": "kvm-quirk-14-wide-segment-store",
        "kvm-quirk-07-scan-of-zero": "kvm-quirk-06-tzcnt-lzcnt"}
# fmt: on


def ruling(panel, subject, case, damage=None):
    (ours,) = subject.run([case])
    ours.gpr = tuple(ours.gpr)
    if damage is not None:
        damage(ours)
    ((found, _),) = panel.rule([case], [ours], panel.first.run([case]))
    return found


def flip_register(outcome):
    gpr = list(outcome.gpr)
    gpr[5] ^= 0x10
    outcome.gpr = tuple(gpr)


def move_on(outcome):
    outcome.rip += 1


def spoil_memory(outcome):
    page = bytearray(outcome.pages.get(PAGE >> 12, b"\0" * 0x1000))
    page[0x700] ^= 0x40
    outcome.pages = {**outcome.pages, PAGE >> 12: bytes(page)}


def other_fault(outcome):
    outcome.exception, outcome.rc = (0, None, None), "propagate_fault"


def test_every_quirk_has_a_case():
    assert BY_RULES.keys() | BY_PROCESSOR.keys() == {quirk.id for quirk in CHECK_QUIRKS}
    assert not {quirk.id for quirk in (*QUIRKS, *MACHINE_QUIRKS)} & {quirk.id for quirk in CHECK_QUIRKS}


@pytest.mark.parametrize("name", BY_RULES)
def test_the_objection_of_rules_is_explained(panel, subject, name):
    found = ruling(panel, subject, BY_RULES[name])
    assert (found.kind, found.reason) == (SKIPPED, ALSO.get(name, name)), found.differences


@pytest.mark.parametrize("name", BY_RULES)
def test_the_quirk_itself_explains_it(subject, name):
    case = BY_RULES[name]
    (ours,) = subject.run([case])
    quirk = next(quirk for quirk in CHECK_QUIRKS if quirk.id == name)
    rules = RulesOracle()
    differences = rules.differences(case, ours)
    assert differences
    if quirk.explains is None:
        assert quirk.instead is not None
        code = quirk.instead(case)
        assert len(code) == len(case.code)
        assert not rules.differences(msgspec.structs.replace(case, code=code), ours)
    else:
        assert quirk.explains(case, ours, rules.demanded(case, ours), differences)


@pytest.mark.parametrize("name", BY_RULES)
def test_another_fault_in_the_same_instruction_is_a_finding(panel, subject, name):
    case = BY_RULES[name]
    (ours,) = subject.run([case])
    damages = [other_fault] if ours.exception else [other_fault, flip_register, move_on]
    if not ours.exception and ours.leaf not in {"0fae/0.mem", "0fae/1.mem"}:
        damages.append(spoil_memory)
    for damage in damages:
        found = ruling(panel, subject, case, damage)
        assert found.kind == FINDING, (damage.__name__, found)


def processor(case, fault, changes):
    gpr = list(case.gpr)
    for register, value in changes.items():
        gpr[REGISTERS.index(register)] = value
    return Outcome(
        case.id,
        tuple(gpr),
        case.rip,
        case.rflags,
        case.system,
        exception=fault,
        rc="continue" if fault is None else "propagate_fault",
    )


@pytest.mark.parametrize("name", BY_PROCESSOR)
def test_the_departure_from_a_processor_is_explained(subject, name):
    case, fault, changes = BY_PROCESSOR[name]
    (ours,) = subject.run([case])
    theirs = processor(case, fault, changes)
    if name == "kvm-quirk-48-lost-batch":
        theirs.pages = ours.pages
    if name == "kvm-quirk-70-cmpxchg-upper":
        theirs.rip, theirs.rflags = ours.rip, ours.rflags
    differences = compare(case, ours, theirs)
    assert differences
    assert explaining_quirk(case, ours, theirs, differences) == name


def test_a_port_is_denied_though_rep_has_nothing_to_do(subject):
    case = case_of(USER, "f36e", rsi=PAGE)
    (ours,) = subject.run([case])
    theirs = processor(case, (14, 0, 0x1866), {})
    assert explaining_quirk(case, ours, theirs, compare(case, ours, theirs)) == "kvm-unreadable-bitmap"


@pytest.mark.parametrize("name", BY_PROCESSOR)
@pytest.mark.parametrize("damage", [other_fault, flip_register, move_on])
def test_another_departure_from_a_processor_is_not(subject, name, damage):
    case, fault, changes = BY_PROCESSOR[name]
    (ours,) = subject.run([case])
    theirs = processor(case, fault, changes)
    if damage is not other_fault and ours.exception and (fault is None or ours.exception[0] != fault[0]):
        return  # of two vectors nothing else is compared
    if name == "kvm-quirk-48-lost-batch":
        theirs.pages = ours.pages
    if name == "kvm-quirk-70-cmpxchg-upper":
        theirs.rip, theirs.rflags = ours.rip, ours.rflags
    ours.gpr = tuple(ours.gpr)
    damage(ours)
    assert explaining_quirk(case, ours, theirs, compare(case, ours, theirs)) is None


def test_the_same_instructions_without_the_quirk_agree(panel, subject):
    for case in (
        case_of(LONG, "fb"),
        case_of(LONG, "0fc308", rax=PAGE),
        based(case_of(LONG, "64010b", rbx=PAGE - 0x1000), 4, base=0x1000),
        based(case_of(LONG, "3e64010b", rbx=PAGE - 0x1000), 4, base=0x1000),
        case_of(LONG, "668c18", rax=PAGE),
        case_of(LONG, "0f7f00", rax=PAGE),
        case_of(LONG, "666308", rax=PAGE),
    ):
        assert ruling(panel, subject, case).kind == AGREE, case.code.hex()


def test_a_wrong_value_stored_by_movnti_is_a_finding(panel, subject):
    def wrong(outcome):
        page = bytearray(outcome.pages[PAGE >> 12])
        page[0] ^= 1
        outcome.pages = {PAGE >> 12: bytes(page)}

    for code in ("660fc308", "f20fc308", "4b660fc308"):
        case = case_of(LONG, code, rax=PAGE, rcx=0x12345678)
        assert ruling(panel, subject, case).reason == "kvm-quirk-71-movnti-prefix"
        assert ruling(panel, subject, case, wrong).kind == FINDING


def test_sldt_reads_a_read_only_segment_too(panel, subject):
    case = based(case_of(SHORT, "2e0f0000", rax=END), 1, type=11)
    assert ruling(panel, subject, case).reason == "kvm-quirk-72-read-before-check"
    assert ruling(panel, subject, case, other_fault).kind == FINDING
