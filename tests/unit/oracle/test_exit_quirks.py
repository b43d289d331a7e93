"""Quirks of exits beyond tasks and events: each is recognised, and another break beside it is a finding."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Outcome, Segment, TableRegister
from emufuzz.fuzz.engines import SUBJECTS
from emufuzz.oracle.compare import FINDING, SKIPPED, judge
from emufuzz.oracle.exits import ExitsOracle
from emufuzz.oracle.quirks import EXIT_QUIRKS, explaining_quirk
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

DOCUMENT = Path(__file__).parents[3] / "docs" / "vouched.md"
GP0, DB = (13, 0, None), (1, None, None)
ABSENT = 0x700000
NON_CANONICAL = 0x8000_0000_1234


@pytest.fixture(scope="module")
def judging():
    """An oracle without gaps of its own: what it would have said is given."""
    return ExitsOracle()


def completed(case, length, **changes):
    """The instruction has done its work."""
    return Outcome(case.id, case.gpr, case.rip + length, case.rflags, case.system, **changes)


def faulted(case, fault):
    return Outcome(
        case.id, case.gpr, case.rip, case.rflags, case.system, rc="propagate_fault", exception=fault
    )


def flip_gpr(outcome):
    outcome.gpr = (*outcome.gpr[:7], outcome.gpr[7] ^ 1, *outcome.gpr[8:])


def other_fault(outcome):
    outcome.rc, outcome.exception = "propagate_fault", (0, None, None)


def flip_page(outcome):
    outcome.pages = {8: b"\1" * 4096}


DAMAGES = (flip_gpr, other_fault, flip_page)


def verdicts(judging, case, ours, theirs):
    """The verdict as it is, and with each damage."""
    found = judge(case, ours, theirs, judging)
    damaged = []
    for damage in DAMAGES:
        changed = msgspec.structs.replace(ours)
        damage(changed)
        damaged.append(judge(case, changed, theirs, judging).kind)
    return found.kind, found.reason, damaged


# WRMSR of an address that is not canonical


def wrmsr(value, index=0x176):
    system = build_system("prot64", 0, msr=((0x174, 0), (0x175, 0), (0x176, 0)))
    case = build_case(
        "prot64", b"\x0f\x30", system=system, rcx=index, rdx=value >> 32, rax=value & 0xFFFFFFFF
    )
    return msgspec.structs.replace(case, path="exit", extra={"kvm": {}})


@pytest.mark.parametrize("index", [0x175, 0x176])
def test_sysenter_addresses_are_extended(judging, index):
    case = wrmsr(NON_CANONICAL, index)
    (ours,) = SUBJECTS["kvm"]().run([case])
    assert dict(ours.system.msr)[index] == 0xFFFF_8000_0000_1234
    kind, reason, damaged = verdicts(judging, case, ours, faulted(case, GP0))
    assert (kind, reason) == (SKIPPED, "kvm-sysenter-address")
    assert damaged == [FINDING] * 3


def test_another_value_or_msr_is_a_finding(judging):
    case = wrmsr(NON_CANONICAL)
    (ours,) = SUBJECTS["kvm"]().run([case])
    wrong = msgspec.structs.replace(ours.system, msr=((0x174, 0), (0x175, 0), (0x176, 5)))
    theirs = faulted(case, GP0)
    assert judge(case, msgspec.structs.replace(ours, system=wrong), theirs, judging).kind == FINDING
    for other in (wrmsr(0x1234), wrmsr(NON_CANONICAL, 0x174)):
        assert judge(other, completed(other, 2), faulted(other, GP0), judging).kind == FINDING


# A bitmap that cannot be read


def port_case(base, code=b"\xec", cpl=3):
    system = build_system("prot32", cpl, tr=Segment(0x50, base, 0x200, 11, p=1))
    return build_case("prot32", code, system=system, rdx=0x60)


@pytest.mark.parametrize("code", [b"\xec", b"\xe6\x60", b"\x6e"])
def test_a_bitmap_that_cannot_be_read_denies(judging, code):
    case = port_case(ABSENT, code)
    (ours,) = FlatSubject(events=False).run([case])
    assert ours.exception == GP0
    kind, reason, damaged = verdicts(judging, case, ours, faulted(case, (14, 0, ABSENT + 102)))
    assert (kind, reason) == (SKIPPED, "kvm-unreadable-bitmap")
    assert damaged == [FINDING] * 3


def test_elsewhere_the_page_fault_is_missed(judging):
    case = port_case(ABSENT)
    ours = faulted(case, GP0)
    assert judge(case, ours, faulted(case, (14, 0, 0x8000)), judging).kind == FINDING
    there = port_case(0x4000)
    assert judge(there, faulted(there, GP0), faulted(there, (14, 0, 0x4066)), judging).kind == FINDING
    kernel = port_case(ABSENT, cpl=0)
    assert (
        judge(kernel, faulted(kernel, GP0), faulted(kernel, (14, 0, ABSENT + 102)), judging).kind == FINDING
    )


# The trap flag of a guest that userspace steps


def stepped(debug=3, flags=X86_EFLAGS_TF):
    case = build_case("prot32", b"\x90", flags=flags)
    return msgspec.structs.replace(case, path="fep", extra={"kvm": {"guest_debug": debug}})


def test_a_stepped_guests_own_trap_flag_does_not_show(judging):
    case = stepped()
    ours = completed(case, 1)
    ours.rflags &= ~X86_EFLAGS_TF
    kind, reason, damaged = verdicts(judging, case, ours, completed(case, 1, exception=DB))
    assert (kind, reason) == (SKIPPED, "kvm-debugged-trap-flag")
    assert damaged == [FINDING] * 3


def test_a_trap_flag_that_popf_loads_does_not_show_either(judging):
    """KVM_GET_REGS hides it; a flag that is hidden without stepping, or shown by KVM alone, is a finding."""
    case = stepped(flags=0)
    loaded = completed(case, 1)
    loaded.rflags |= X86_EFLAGS_TF
    verdict = judge(case, completed(case, 1), loaded, judging)
    assert (verdict.kind, verdict.reason) == (SKIPPED, "kvm-debugged-trap-flag")
    assert judge(stepped(1, 0), completed(case, 1), loaded, judging).kind == FINDING
    assert judge(case, loaded, completed(case, 1), judging).kind == FINDING


def test_rules_object_to_the_hidden_flag_alone():
    """Of REP INS that goes on; RF is set there, and other flags are not excused."""
    case = build_case("prot32", b"\xf3\x6d", flags=X86_EFLAGS_TF | 0x3000, rcx=8, rdi=0x8000)
    case = msgspec.structs.replace(case, path="io-completion", extra={"kvm": {"guest_debug": 3}})
    rules, ours = RulesOracle(), leafed(completed(case, 0), "6d")
    ours.rflags = ours.rflags & ~X86_EFLAGS_TF | X86_EFLAGS_RF
    found = rules.differences(case, ours)
    assert [(d.field, d.subject) for d in found] == [("rflags", "TF changed")]
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) == "kvm-debugged-trap-flag"
    ours.rflags ^= 1
    found = rules.differences(case, ours)
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) is None


def test_rules_miss_the_trap_as_well():
    case, rules = stepped(), RulesOracle()
    ours = leafed(completed(case, 1), "90")
    ours.rflags, ours.extra = ours.rflags & ~X86_EFLAGS_TF, {"injected": []}
    found = rules.differences(case, ours)
    assert {d.subject for d in found} == {"TF changed", "no #DB"}
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) == "kvm-debugged-trap-flag"
    ours.rflags |= X86_EFLAGS_TF
    found = rules.differences(case, ours)
    assert [d.subject for d in found] == ["no #DB"]
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) is None


def port_7e(debug=3, port="7e"):
    """OUT imm8 of a guest that userspace steps: what KVM makes of it, and what the device should have got."""
    case = build_case("prot32", bytes.fromhex("e6" + port), cpl=0)
    case = msgspec.structs.replace(case, path="exit", extra={"kvm": {"guest_debug": debug}})
    out = {"kind": "pio", "port": int(port, 16), "size": 1, "direction": "write", "data": "00"}
    ours, theirs = completed(case, 2), completed(case, 2)
    ours.extra, theirs.extra = {"device_trace": [], "exits": [{"reason": "DEBUG"}]}, {"device_trace": [out]}
    return case, ours, theirs


def detected(code="0f21c3", debug=0x20001, dr7=0x2402):
    system = build_system("prot64", 0, dr=(0x1234, 0, 0, 0, 0, 0, 0xFFFF0FF0, dr7))
    case = build_case("prot64", bytes.fromhex(code) + b"\xf4", cpl=0, system=system, rbx=5)
    return msgspec.structs.replace(case, path="exit", extra={"kvm": {"guest_debug": debug}})


def moved(case, number, value):
    """What is there after MOV has written a debug register."""
    ours = completed(case, 3)
    dr = (*case.system.dr[:number], value, *case.system.dr[number + 1 :])
    ours.system = msgspec.structs.replace(case.system, dr=dr)
    return ours


@pytest.mark.parametrize("code", ["0f21c3", "0f23c3", "0f23f3", "0f23fb", "0f23e3"])
def test_general_detection_is_userspaces(judging, code):
    case = detected(code)
    written = {"0f23c3": (0, 5), "0f23f3": (6, 0xFFFF0FF5), "0f23e3": (6, 0xFFFF0FF5), "0f23fb": (7, 0x405)}
    ours = moved(case, *written.get(code, (0, 0x1234)))
    if code == "0f21c3":
        ours.gpr = (*case.gpr[:3], 0x1234, *case.gpr[4:])
    kind, reason, damaged = verdicts(judging, case, ours, faulted(case, DB))
    assert (kind, reason) == (SKIPPED, "kvm-debugged-detection")
    assert damaged == [FINDING] * 3


@pytest.mark.parametrize(("code", "number", "value"), [
    ("0f23c3", 0, 0x1234), ("0f23c3", 1, 5), ("0f23f3", 6, 0xFFFF0FF0), ("0f23fb", 7, 0x2405),
    ("0f21c3", 0, 5),
])  # fmt: skip
def test_a_debug_register_has_what_mov_writes_to_it_and_no_other_changes(judging, code, number, value):
    case = detected(code)
    ours = moved(case, number, value)
    if code == "0f21c3":
        ours.gpr = (*case.gpr[:3], 0x1234, *case.gpr[4:])
    assert judge(case, ours, faulted(case, DB), judging).kind == FINDING


@pytest.mark.parametrize("case", [detected(debug=1), detected(dr7=0x402), detected("0f20c3")])
def test_general_detection_of_the_guest_is_not(judging, case):
    assert judge(case, completed(case, 3), faulted(case, DB), judging).kind == FINDING


def test_out_to_port_7e_is_lost_in_a_step(judging):
    case, ours, theirs = port_7e()
    kind, reason, damaged = verdicts(judging, case, ours, theirs)
    assert (kind, reason) == (SKIPPED, "kvm-lost-port-7e")
    assert damaged == [FINDING] * 3


@pytest.mark.parametrize("sides", [port_7e(debug=1), port_7e(port="7d")], ids=["not stepped", "another port"])
def test_another_access_that_is_lost_is_a_finding(judging, sides):
    assert judge(*sides, judging).kind == FINDING


@pytest.mark.parametrize("case", [stepped(1), stepped(flags=0), stepped({"control": 1, "dr": [0] * 8})])
def test_without_stepping_a_lost_trap_is_a_finding(judging, case):
    assert judge(case, completed(case, 1), completed(case, 1, exception=DB), judging).kind == FINDING


def test_another_flag_of_a_stepped_guest_is_a_finding(judging):
    case = stepped()
    ours = completed(case, 1)
    ours.rflags ^= X86_EFLAGS_TF | 1
    assert judge(case, ours, completed(case, 1, exception=DB), judging).kind == FINDING


# SLDT that UMIP forbids, and descriptor tables in a device


def umip(code, cpl=3, cr4=0x800, rdi=0xB000):
    case = build_case("prot32", code, system=build_system("prot32", cpl, cr4=cr4), rdi=rdi)
    return msgspec.structs.replace(case, path="desc", extra={"kvm": {}})


def leafed(outcome, leaf):
    outcome.leaf = leaf
    return outcome


def test_sldt_reads_before_umip_forbids_it(judging):
    case = umip(b"\x0f\x00\x07")
    ours = leafed(faulted(case, (14, 6, 0xB000)), "0f00/0")
    kind, reason, damaged = verdicts(judging, case, ours, faulted(case, GP0))
    assert (kind, reason) == (SKIPPED, "kvm-quirk-15-read-before-umip")
    assert damaged == [FINDING] * 3


@pytest.mark.parametrize(
    ("case", "address"),
    [(umip(b"\x0f\x00\x07", cpl=0), 0xB000), (umip(b"\x0f\x00\x07", cr4=0), 0xB000),
     (umip(b"\x0f\x00\x07"), 0xB010)],
)  # fmt: skip
def test_another_page_fault_of_sldt_is_a_finding(judging, case, address):
    ours = leafed(faulted(case, (14, 6, address)), "0f00/0")
    assert judge(case, ours, faulted(case, GP0), judging).kind == FINDING


def test_str_that_umip_forbids_looks_at_its_stack_first(judging):
    """An address beyond the canonical ones, of the stack, is #SS(0)."""
    case = build_case("prot64", b"\x0f\x00\x0c\x24", system=build_system("prot64", 3, cr4=0xE20), rsp=1 << 47)
    case = msgspec.structs.replace(case, path="desc", extra={"kvm": {}})
    ours = leafed(faulted(case, (12, 0, None)), "0f00/1")
    kind, reason, damaged = verdicts(judging, case, ours, faulted(case, GP0))
    assert (kind, reason) == (SKIPPED, "kvm-quirk-15-read-before-umip")
    assert damaged == [FINDING] * 3
    inside = msgspec.structs.replace(case, gpr=(*case.gpr[:4], 0xC000, *case.gpr[5:]))
    assert judge(inside, ours, faulted(inside, GP0), judging).kind == FINDING


def test_rules_know_what_sldt_reads_of_a_device():
    """Its operand lies in two pages of a device."""
    device = {"kind": "mmio", "addr": "0xdffc", "size": 8}
    case = umip(b"\x0f\x00\x07", rdi=0xDFFE)
    case = msgspec.structs.replace(case, extra={"kvm": {}, "devices": [device]})
    (ours,), rules = SUBJECTS["kvm"]().run([case]), RulesOracle()
    found = rules.differences(case, ours)
    assert [d.field for d in found] == ["device_trace"]
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) == "kvm-quirk-14-15-segment-store"
    ours.extra = {**ours.extra, "device_trace": ours.extra["device_trace"] * 2}
    found = rules.differences(case, ours)
    assert explaining_quirk(case, ours, rules.demanded(case, ours), found) is None


def stuck(flags=X86_EFLAGS_TF, rdi=0xB000):
    """SGDT of a device: KVM is where it was; an oracle has written."""
    case = build_case("prot32", b"\x0f\x01\x07", flags=flags, rdi=rdi)
    case = msgspec.structs.replace(case, path="desc", extra={"kvm": {}})
    ours, theirs = leafed(faulted(case, DB), "0f01/0.mem"), completed(case, 3, exception=DB)
    access = {"kind": "mmio", "addr": "0xb000", "size": 6, "direction": "write", "data": "00" * 6}
    ours.extra, theirs.extra = {"device_trace": []}, {"device_trace": [access]}
    return case, ours, theirs


def test_a_table_in_a_device_is_not_stored(judging):
    kind, reason, damaged = verdicts(judging, *stuck())
    assert (kind, reason) == (SKIPPED, "kvm-table-on-device")
    assert damaged == [FINDING] * 3


def test_rules_know_that_a_table_begins_in_a_device(judging):
    """They demand the #PF of what is behind the device; behind memory KVM would raise it, too."""
    case, ours, _ = stuck()
    beyond = faulted(case, (14, 2, 0xC000))
    assert judge(case, ours, beyond, judging).reason == "kvm-table-on-device"
    there = msgspec.structs.replace(case, gpr=(*case.gpr[:7], 0x8000, *case.gpr[8:]))
    ours = msgspec.structs.replace(ours, gpr=there.gpr)
    assert judge(there, ours, faulted(there, (14, 2, 0xC000)), judging).kind == FINDING


def test_without_device_or_trap_it_is_a_finding(judging):
    case, ours, theirs = stuck(rdi=0x8000)
    theirs.extra = {"device_trace": []}
    assert judge(case, ours, theirs, judging).kind == FINDING
    assert judge(*stuck(flags=0), judging).kind == FINDING


def test_behind_the_device_there_may_be_nothing(judging):
    case, ours, theirs = stuck()
    beyond = faulted(case, (14, 2, 0xC000))
    beyond.extra = theirs.extra
    kind, reason, damaged = verdicts(judging, case, ours, beyond)
    assert (kind, reason) == (SKIPPED, "kvm-table-on-device")
    assert damaged == [FINDING] * 3
    beyond.exception = (13, 0, None)
    assert judge(case, ours, beyond, judging).kind == FINDING


# Writes to EOI


def eoi(code, address=0xFEE000B0):
    """POP or STOS to a register of the local APIC."""
    case = build_case("prot32", bytes.fromhex(code), rbx=address, rdi=address, rcx=4)
    extra = {"kvm": {"lapic": {0xF0: 0x1FF, 0x80: 0}}}
    return msgspec.structs.replace(case, path="apic-access", extra=extra)


@pytest.mark.parametrize("code", ["8f03", "ab"])
def test_a_write_to_eoi_is_skipped(code):
    case, oracle = eoi(code), UnicornOracle()
    (ours,), (theirs,) = SUBJECTS["kvm"]().run([case]), oracle.run([case])
    assert ours.gpr == case.gpr != theirs.gpr
    kind, reason, damaged = verdicts(oracle, case, ours, theirs)
    assert (kind, reason) == (SKIPPED, "kvm-fast-eoi")
    assert damaged == [FINDING] * 3
    assert judge(case, msgspec.structs.replace(ours, rip=ours.rip + 1), theirs, oracle).kind == FINDING
    elsewhere = eoi(code, 0xFEE00080)
    (theirs,) = oracle.run([elsewhere])
    undone = msgspec.structs.replace(ours, gpr=elsewhere.gpr)
    assert judge(elsewhere, undone, theirs, oracle).kind == FINDING


# Values of CR8


def priority(value, path="exit"):
    case = build_case("prot64", bytes.fromhex("440f22c0"), cpl=0, rax=value)
    return msgspec.structs.replace(case, path=path, extra={"kvm": {}})


def test_of_a_priority_the_low_byte_counts(judging):
    case = priority(0x808)
    (ours,) = SUBJECTS["kvm"]().run([case])
    assert (ours.exception, ours.system.cr8) == (None, 8)
    kind, reason, damaged = verdicts(judging, case, ours, faulted(case, GP0))
    assert (kind, reason) == (SKIPPED, "kvm-short-priority")
    assert damaged == [FINDING] * 3
    other = msgspec.structs.replace(ours.system, cr8=7)
    assert (
        judge(case, msgspec.structs.replace(ours, system=other), faulted(case, GP0), judging).kind == FINDING
    )


@pytest.mark.parametrize("case", [priority(0x818), priority(0x10), priority(0x808, "fep")])
def test_another_priority_that_is_taken_is_a_finding(judging, case):
    ours = completed(case, 4)
    ours.system = msgspec.structs.replace(case.system, cr8=case.gpr[0] & 0xF)
    assert judge(case, ours, faulted(case, GP0), judging).kind == FINDING


# The deadline of the TSC, of which userspace wants to hear


def deadline(index=0x6E0, denied="0x6e0", path="exit"):
    case = build_case("prot64", b"\x0f\x30", cpl=0, rcx=index)
    knobs = {"msr_denied": denied, "user_space_msr_mask": 4}
    return msgspec.structs.replace(case, path=path, extra={"kvm": {"knobs": knobs}})


def test_a_deadline_that_userspace_denies_is_set_all_the_same():
    case, oracle = deadline(), ExitsOracle()
    (ours,), (theirs,) = SUBJECTS["kvm"]().run([case]), oracle.run([case])
    assert (ours.exception, theirs.exception) == (None, GP0)
    kind, reason, damaged = verdicts(oracle, case, ours, theirs)
    assert (kind, reason) == (SKIPPED, "kvm-unfiltered-deadline")
    assert damaged == [FINDING] * 3
    other = msgspec.structs.replace(ours.system, msr=(*ours.system.msr, (0x174, 5)))
    assert judge(case, msgspec.structs.replace(ours, system=other), theirs, oracle).kind == FINDING


@pytest.mark.parametrize("case", [deadline(0x174, "0x174"), deadline(denied="0x174"), deadline(path="fep")])
def test_another_msr_that_is_let_through_is_a_finding(judging, case):
    assert judge(case, completed(case, 2), faulted(case, GP0), judging).kind == FINDING


# An event of a stepped guest, in the middle of which TF would be pushed


def pushed(control=3, limit=0x3FF):
    """An NMI in real mode with TF set; the vector table is at 8000H."""
    system = msgspec.structs.replace(build_system("real"), idtr=TableRegister(0x8000, limit))
    table = {0x8008: bytes.fromhex("10020050")}
    case = build_case("real", b"\x90", system=system, flags=X86_EFLAGS_TF, data=table, rsp=0xC800)
    kvm = {"nmi": 1, "guest_debug": control}
    return msgspec.structs.replace(case, path="rmode-inject", extra={"kvm": kvm})


def test_an_event_pushes_flags_without_the_hidden_one():
    case, oracle = pushed(), ExitsOracle()
    (ours,), (theirs,) = SUBJECTS["kvm"]().run([case]), oracle.run([case])
    assert ours.pages != theirs.pages
    kind, reason, damaged = verdicts(oracle, case, ours, theirs)
    assert (kind, reason) == (SKIPPED, "kvm-debugged-trap-flag")
    assert damaged == [FINDING] * 3
    assert judge(pushed(1), ours, theirs, oracle).kind == FINDING


def test_so_it_does_where_the_table_ends_before_its_entry():
    case, oracle = pushed(limit=7), ExitsOracle()
    (ours,), (theirs,) = SUBJECTS["kvm"]().run([case]), oracle.run([case])
    assert (ours.exception, theirs.exception) == (None, (13, None, None))
    kind, reason, damaged = verdicts(oracle, case, ours, theirs)
    assert (kind, reason) == (SKIPPED, "kvm-vector-table-limit")
    assert damaged == [FINDING] * 3


# A breakpoint that is met again


def passed(flags=X86_EFLAGS_RF, address=0x6000):
    system = build_system("prot32", 0, dr=(address, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x402))
    case = build_case("prot32", b"\x90", system=system, rip=0x6000, flags=flags)
    return msgspec.structs.replace(case, path="desc", extra={"kvm": {}})


def test_a_breakpoint_is_met_again(judging):
    case = passed()
    kind, reason, damaged = verdicts(judging, case, faulted(case, DB), completed(case, 1))
    assert (kind, reason) == (SKIPPED, "kvm-breakpoint-again")
    assert damaged == [FINDING] * 3


@pytest.mark.parametrize("case", [passed(0), passed(address=0x6001)])
def test_another_debug_exception_is_a_finding(judging, case):
    assert judge(case, faulted(case, DB), completed(case, 1), judging).kind == FINDING


def test_the_document_lists_them_all():
    rows = re.findall(r"^\| `(kvm-[a-z0-9-]+)` \| (.+) \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows == [(quirk.id, quirk.kvm, quirk.reference) for quirk in EXIT_QUIRKS]


def test_the_hidden_flag_beside_a_fault(judging):
    """RF waits for the delivery of the fault; another flag is a finding."""
    case = stepped()
    theirs = faulted(case, GP0)
    ours = faulted(case, GP0)
    ours.rflags, theirs.rflags = ours.rflags & ~X86_EFLAGS_TF, theirs.rflags | X86_EFLAGS_RF
    verdict = judge(case, ours, theirs, judging)
    assert (verdict.kind, verdict.reason) == (SKIPPED, "kvm-debugged-trap-flag")
    ours.rflags ^= 1
    assert judge(case, ours, theirs, judging).kind == FINDING


def test_a_breakpoint_is_met_again_where_a_step_would_end(judging):
    """The single-step trap behind the instruction is the same exception."""
    case = passed(X86_EFLAGS_RF | X86_EFLAGS_TF)
    ours, theirs = faulted(case, DB), completed(case, 1, exception=DB)
    ours.rc = theirs.rc = "continue"
    kind, reason, damaged = verdicts(judging, case, ours, theirs)
    assert (kind, reason) == (SKIPPED, "kvm-breakpoint-again")
    assert damaged == [FINDING] * 3
    plain = passed(X86_EFLAGS_RF)
    assert judge(plain, ours, theirs, judging).kind == FINDING
