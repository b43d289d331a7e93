"""Each quirk is recognised where it shows, and another fault in the same instruction is still reported."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch.rflags import X86_EFLAGS_CF
from emufuzz.case.model import Memory, Segment
from emufuzz.fuzz.environments import environments
from emufuzz.fuzz.generate import generate_batch
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge
from emufuzz.oracle.quirks import QUIRKS
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

PAGE = 0x8000
END = 0x9000
TOP = 0x7FFFFFFFF000
REGISTERS = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


@pytest.fixture(scope="module")
def oracle():
    return UnicornOracle()


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
        rflags=flags | (0x20000 if mode == "vm86" else 0),
        gpr=tuple(registers),
        system=env.system,
        mem=Memory(((PAGE, b"\x11" * 16), *entries)),
    )


def with_ldt(case, base=PAGE + 0x20):
    """The case with an LDT; its first entry may be the descriptor of another."""
    seg = (*case.system.seg[:7], Segment(0x60, base, 0x7F, type=2, s=0, p=1, db=0))
    return msgspec.structs.replace(case, system=msgspec.structs.replace(case.system, seg=seg))


LDT = (PAGE + 0x20, bytes.fromhex("ff0f008100820000") + bytes(8))
ABSENT_LDT = (PAGE + 0x20, bytes.fromhex("ff0f008100020000") + bytes(8))

# fmt: off
CASES = {
    "kvm-quirk-06-tzcnt-lzcnt":         case_of("prot64-cpl0-flat", "f30fbdc1", rcx=0x1234, rax=9),
    "kvm-quirk-08-aam-aad-flags":       case_of("prot32-cpl0-flat", "d40a", rax=0x80000001),
    "kvm-quirk-14-wide-segment-store":  case_of("prot64-cpl0-flat", "488c18", rax=PAGE),
    "kvm-quirk-17-shadow-on-fault":     case_of("prot32-cpl0-flat", "8ed0", rax=0xFFF8),
    "kvm-quirk-19-vm86-cli-sti":        case_of("vm86-cpl3-flat", "fa", flags=0x3202),
    "kvm-quirk-20-vm86-pushf-popf":     case_of("vm86-cpl3-flat", "9c", (0xC000, b""), rsp=0x100),
    "kvm-quirk-21-enter":               case_of("prot32-cpl0-stack16", "c8080000", rsp=PAGE + 64, rbp=0x1234),
    "kvm-quirk-23-iret-real":           case_of("real-cpl0-cs32", "cf", (0xC000, b"\0\0\1"), rsp=0),
    "kvm-quirk-41-prefetch-register":   case_of("prot64-cpl0-flat", "0f0dc8"),
    "kvm-quirk-41-movntdq-register":    case_of("prot64-cpl0-flat", "660fe7c1"),
    "kvm-quirk-16-segment-source-first": case_of("prot32-cpl0-flat", "8e38", rax=END),
    "kvm-rex-r-segment-register":       case_of("prot64-cpl0-flat", "448cd8"),
    "kvm-lldt-in-ldt":                  with_ldt(case_of("prot64-cpl0-flat", "0f00d0", LDT, rax=4)),
    "kvm-ltr-ti-error-code":            case_of("prot64-cpl0-flat", "0f00d8", rax=0xFFC),
    "kvm-quirk-37-system-descriptor":   case_of("prot64-cpl0-flat", "0f00d8", rax=0x60),
    "kvm-quirk-43-table-read":          case_of("real-cpl0-flat", "0f011f", rbx=0xFFB),
    "kvm-null-ss-hidden-part":          case_of("prot64-cpl0-flat", "8ed0"),
    "kvm-quirk-01-canonical-straddle":  case_of("prot64-cpl0-flat", "8b00", (TOP, b""), rax=TOP + 0xFFE),
    "kvm-page-split-write":             case_of("prot64-cpl0-flat", "8908", rax=END - 2, rcx=0x55555555),
    "kvm-prefixed-xsetbv":              case_of("prot64-cpl3-flat", "660f01d1", rax=3),
    "kvm-rep-zero-count":               case_of("prot64-cpl0-flat", "67f3a4", rcx=1 << 32, rsi=1 << 33),
}
# fmt: on


CARRY_UNDEFINED = {"kvm-quirk-06-tzcnt-lzcnt", "kvm-quirk-08-aam-aad-flags"}


def flip_register(outcome):
    gpr = list(outcome.gpr)
    gpr[3] ^= 0x10
    outcome.gpr = tuple(gpr)


def flip_carry(outcome):
    outcome.rflags ^= X86_EFLAGS_CF


def move_on(outcome):
    outcome.rip += 1


def lose_fault(outcome):
    outcome.exception, outcome.rc = None, "continue"


def other_fault(outcome):
    outcome.exception = (0, None, None)


class Processor:
    """Says what Unicorn says, and stands for it: of such registers Unicorn has the #UD of AMD processors."""

    name = "processor"
    ledger = ()

    def __init__(self, unicorn):
        self.run = unicorn.run

    def unchecked(self, case, outcome):
        return ()


#: Quirks against which Unicorn does not vouch, but the processors that it follows do.
BY_PROCESSORS = {"kvm-quirk-41-prefetch-register"}


def judge_of(name, unicorn):
    return Processor(unicorn) if name in BY_PROCESSORS else unicorn


def verdict(case, subject, oracle, damage=None):
    (ours,) = subject.run([case])
    (theirs,) = oracle.run([case])
    ours.gpr = tuple(ours.gpr)
    if damage is not None:
        damage(ours)
    return judge(case, ours, theirs, oracle)


def test_every_quirk_has_a_case():
    assert set(CASES) == {quirk.id for quirk in QUIRKS}


@pytest.mark.parametrize("name", CASES)
def test_the_quirk_is_recognised(subject, oracle, name):
    found = verdict(CASES[name], subject, oracle)
    assert (found.kind, found.reason) == (SKIPPED, name), found.differences


@pytest.mark.parametrize("name", CASES)
def test_another_fault_in_the_same_instruction_is_a_finding(subject, oracle, name):
    case = CASES[name]
    (ours,) = subject.run([case])
    damages = (
        (other_fault,) if ours.exception is not None else (flip_register, flip_carry, move_on, other_fault)
    )
    for damage in damages:
        if damage is flip_carry and name in CARRY_UNDEFINED:
            continue
        found = verdict(case, subject, judge_of(name, oracle), damage)
        assert found.kind == FINDING, (damage.__name__, found.reason)


@pytest.mark.parametrize(
    "case",
    [
        case_of("prot64-cpl0-flat", "f30fbcc1", rcx=0, rax=9),  # TZCNT of 0
        case_of("prot64-cpl0-flat", "66f30fbdc1", rcx=0x80, rax=1 << 40),
    ],
)
def test_counting_zeros_in_other_widths(subject, oracle, case):
    assert verdict(case, subject, oracle).reason == "kvm-quirk-06-tzcnt-lzcnt"


@pytest.mark.parametrize(
    ("case", "fault"),
    [
        (with_ldt(case_of("prot32-cpl0-flat", "0f00d0", ABSENT_LDT, rax=7)), (11, 4, None)),
        (with_ldt(case_of("prot64-cpl0-flat", "0f00d0", rax=4), END), (14, 0, END)),
        (
            with_ldt(case_of("prot64-cpl0-flat", "0f00d0", (END - 8, LDT[1][:8]), rax=4), END - 8),
            (14, 0, END),
        ),
    ],
)
def test_faults_of_reading_the_ldt(subject, oracle, case, fault):
    (ours,) = subject.run([case])
    assert ours.exception == fault
    assert verdict(case, subject, oracle).reason == "kvm-lldt-in-ldt"


def test_another_ldt_than_that_of_the_descriptor_is_not_excused(subject, oracle):
    def wrong(outcome):
        ldtr = msgspec.structs.replace(outcome.system.seg[7], base=0x8200)
        seg = (*outcome.system.seg[:7], ldtr)
        outcome.system = msgspec.structs.replace(outcome.system, seg=seg)

    assert verdict(CASES["kvm-lldt-in-ldt"], subject, oracle, wrong).kind == FINDING


def test_a_wrong_scan_is_not_excused(subject, oracle):
    case = CASES["kvm-quirk-06-tzcnt-lzcnt"]

    def wrong(outcome):
        outcome.gpr = (outcome.gpr[0] ^ 1, *outcome.gpr[1:])

    assert verdict(case, subject, oracle, wrong).kind == FINDING


def test_the_same_instructions_without_the_quirk_agree(subject, oracle):
    for case in (
        case_of("prot64-cpl0-flat", "0fbdc1", rcx=0x1234),
        case_of("prot64-cpl0-flat", "8c18", rax=PAGE),
        case_of("prot32-cpl0-flat", "c8080000", rsp=PAGE + 0x100),
        case_of("prot64-cpl0-flat", "67f3a4", rsi=PAGE, rdi=PAGE + 8),
    ):
        assert verdict(case, subject, oracle).kind == AGREE
