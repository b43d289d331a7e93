"""What no oracle can say of an exit path, and what forced emulation does to RFLAGS before the instruction."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.build import build_case, build_system
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.kvm.options import options_from_knobs
from emufuzz.oracle.native_view import FORCED_PREFIX, asks_for_msr, check_judged, without_harness
from emufuzz.oracle.unicorn import UnicornOracle


def on_path(path, code=b"\x90", flags=0, system=None, **kvm):
    case = build_case("prot32", code, flags=flags, system=system)
    return msgspec.structs.replace(case, path=path, extra={"kvm": kvm} if kvm else None)


# fmt: off
#: Code, what the case says of the exit, and whether that is what hardware would say.
DESCRIBED = {
    "nothing":            ("f4",       {},                                              True),
    "hlt":                ("f4",       {"exit_reason": 12},                             True),
    "another":            ("f4",       {"exit_reason": 10},                             False),
    "cpuid":              ("0fa2",     {"exit_reason": 10},                             True),
    "lone qualification": ("f4",       {"exit_qualification": 12},                      False),
    "information":        ("f4",       {"exit_reason": 12, "instruction_info": 1},      False),
    "mov to cr3":         ("0f22d8",   {"exit_reason": 28, "exit_qualification": 3},    True),
    "mov to another":     ("0f22d8",   {"exit_reason": 28, "exit_qualification": 4},    False),
    "mov from cr3":       ("0f20d9",   {"exit_reason": 28, "exit_qualification": 0x113}, True),
    "mov to dr7":         ("0f23f8",   {"exit_reason": 29, "exit_qualification": 7},    True),
    "mov to cr, no more": ("0f22d8",   {"exit_reason": 28},                             False),
    "hlt, more":          ("f4",       {"exit_reason": 12, "exit_qualification": 0},    False),
    "in, no port":        ("66ed",     {"exit_reason": 30},                             False),
    "no instruction's":   ("f4",       {"exit_reason": 1},                              False),
}
# fmt: on


@pytest.mark.parametrize("name", DESCRIBED)
def test_a_described_exit_is_judged_if_it_is_the_instructions_own(name):
    code, kvm, own = DESCRIBED[name]
    case = on_path("exit", bytes.fromhex(code), **kvm)
    if own:
        check_judged(case)
        return
    with pytest.raises(UnsupportedCaseError, match=r"kvm.exit_reason: the exit is not"):
        check_judged(case)


def test_an_interrupt_of_the_local_apic_changes_nothing_before_the_end():
    check_judged(on_path("invalid-guest-state", lapic={0x200: 0x80000000}))


# fmt: off
#: Path, code, RCX, and whether userspace is asked; it has denied C0000101H and 800H.
ASKED = {
    "rdmsr":          ("fep",            "0f32",           0xC0000101, True),
    "wrmsr":          ("fep",            "0f0b6b766d0f30", 0xC0000101, True),
    "with prefixes":  ("fep",            "670f32",         0xC0000101, True),
    "another msr":    ("fep",            "0f32",           0xC0000102, False),
    "x2apic":         ("fep",            "0f32",           0x800,      False),
    "another insn":   ("ept-violation",  "90",             0xC0000101, False),
    "completion":     ("msr-completion", "0f0b6b766d0f32", 0xC0000101, True),
    "not asked":      ("msr-completion", "0f0b6b766d0f32", 0xC0000102, False),
}
# fmt: on


@pytest.mark.parametrize(
    ("denied", "asked"), [("0x3f,", True), (" 63 , 1", True), (",", False), ("0x30,", False)]
)
def test_lists_of_msrs_are_read_as_kvm_reads_them(denied, asked):
    case = on_path("fep", bytes.fromhex("0f32"), knobs={"msr_denied": denied})
    case = msgspec.structs.replace(case, gpr=(case.gpr[0], 0x3F, *case.gpr[2:]))
    assert asks_for_msr(case) == asked == (0x3F in options_from_knobs({"msr_denied": denied}).msr_denied)


@pytest.mark.parametrize("name", ASKED)
def test_msrs_that_userspace_answers_for_are_not_judged(name):
    path, code, rcx, asked = ASKED[name]
    case = on_path(path, bytes.fromhex(code), knobs={"msr_denied": "0xc0000101,0x800"})
    case = msgspec.structs.replace(case, gpr=(case.gpr[0], rcx, *case.gpr[2:]))
    assert asks_for_msr(case) == asked
    if asked:
        with pytest.raises(UnsupportedCaseError, match="msr_denied"):
            check_judged(case)
    else:
        check_judged(case)


@pytest.mark.parametrize(("knob", "left"), [(1, X86_EFLAGS_RF), (3, 0)])
def test_forced_emulation_may_clear_rf(knob, left):
    case = on_path("fep", FORCED_PREFIX + b"\x90", X86_EFLAGS_RF, knobs={"force_emulation_prefix": knob})
    assert without_harness(case).rflags & X86_EFLAGS_RF == left


@pytest.fixture(scope="module")
def unicorn():
    oracle = UnicornOracle()
    yield oracle
    oracle.close()


def armed(address, dr7, **kvm):
    system = build_system("prot32", dr=(address, 0, 0, 0, 0, 0, 0xFFFF0FF0, dr7))
    return on_path("ept-violation", system=system, **kvm)


# fmt: off
#: Breakpoint 0 and DR7 -> whether Unicorn, which has none, can judge a NOP at 6000H.
BREAKPOINTS = {
    "on the instruction": (0x6000, 0x402,    False),
    "beside it":          (0x6001, 0x402,    True),
    "off":                (0x6000, 0x400,    True),
    "on data":            (0x7000, 0x30402,  False),
    "general detection":  (0x7000, 0x2400,   False),
}
# fmt: on


@pytest.mark.parametrize("name", BREAKPOINTS)
def test_unicorn_judges_what_meets_no_breakpoint(unicorn, name):
    address, dr7, judged = BREAKPOINTS[name]
    if judged:
        unicorn.check(armed(address, dr7))
        return
    with pytest.raises(UnsupportedCaseError, match=r"^dr: "):
        unicorn.check(armed(address, dr7))


@pytest.mark.parametrize("code", ["9c", "9d", "cf", "8ed0", "17", "f3a4", "cc", "cd20", "f1"])
def test_unicorn_is_not_asked_where_the_trap_flag_does_more_than_to_trap(unicorn, code):
    with pytest.raises(UnsupportedCaseError, match=r"^rflags: "):
        unicorn.check(on_path("ept-violation", bytes.fromhex(code), flags=X86_EFLAGS_TF))


def test_a_single_step_trap_follows_what_unicorn_has_run(unicorn):
    stepped = on_path("ept-violation", b"\x01\xd8", flags=X86_EFLAGS_TF)
    unicorn.check(stepped)
    (outcome,) = unicorn.run([stepped])
    assert outcome.exception == (1, None, None)
    assert outcome.rip == stepped.rip + 2
    assert outcome.rflags & X86_EFLAGS_TF


def test_a_fault_is_not_followed_by_a_single_step_trap(unicorn):
    (outcome,) = unicorn.run([on_path("ept-violation", b"\x0f\x0b", flags=X86_EFLAGS_TF)])
    assert outcome.exception == (6, None, None)
    assert outcome.rflags & X86_EFLAGS_TF
