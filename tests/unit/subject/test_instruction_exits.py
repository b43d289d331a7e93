"""Which instructions exit in which state, and what hardware reports (SDM Vol. 3C 25.1, 27.2.1)."""

from __future__ import annotations

from typing import Any

import pytest
from support.handler_cases import DR7, RIP, SHADOW_PAGING, debug_registers, exit_case

from emufuzz.arch.cr import X86_CR4_DE, X86_CR4_PCE
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.model import UNUSABLE
from emufuzz.case.segments import segment_data
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.subject.kvm.build import build_machine, kvm_of
from emufuzz.subject.kvm.enter import ExitInfo, hardware_exit
from emufuzz.subject.kvm.instruction_exits import NoExitError, instruction_exit
from emufuzz.subject.kvm.paths import enter_exit

MOV_SS = 2
DE = {"cr4": 0x620 | X86_CR4_DE}
LDT32 = segment_data(0x28, bits=32, base=0x1000, limit=0xFFF)


def info_of(code: str, mode: str = "prot64", **kwargs: Any) -> ExitInfo:
    """The exit, with all pages mapped by an earlier one of the same machine."""
    case = exit_case(code, mode, **kwargs)
    machine, _ = build_machine(case, {})
    enter_exit(machine, {**kvm_of(case), "exit_reason": er.EXIT_REASON_PREEMPTION_TIMER})
    return instruction_exit(machine)


CR, DR, IO = er.EXIT_REASON_CR_ACCESS, er.EXIT_REASON_DR_ACCESS, er.EXIT_REASON_IO_INSTRUCTION
CPUID, RDPMC, VMCALL = er.EXIT_REASON_CPUID, er.EXIT_REASON_RDPMC, er.EXIT_REASON_VMCALL
PCE = {"cr4": 0x620 | X86_CR4_PCE}

# fmt: off
EXITS = {
    "MOV DR ahead of its privilege":  ("0f21c0",   {"cpl": 3},                    DR,     0x10),
    "MOV DR4 ahead of its existence": ("0f23e3",   {"system": DE},                DR,     0x304),
    "MOV DR in virtual-8086 mode":    ("0f21c0",   {"mode": "vm86"},              DR,     0x10),
    "MOV CR0 with a bit above 31":    ("0f22c1",   {"rcx": 1 << 33 | 0x80010033}, CR,     0x100),
    "MOV CR0 that changes CD":        ("0f22c0",   {"rax": 0xC0010033},           CR,     0),
    "MOV from CR8":                   ("450f20c7", {},                            CR,     0xF18),
    "MOV CR3 without EPT":            ("0f22d8",   {"knobs": SHADOW_PAGING, "physical": True}, CR, 3),
    "LMSW that sets EM":              ("0f01f0",   {"rax": 7},                    CR,     0x70030),
    "CPUID at CPL 3":                 ("0fa2",     {"cpl": 3},                    CPUID,  0),
    "RDPMC at CPL 3 with CR4.PCE":    ("0f33",     {"cpl": 3, "system": PCE},     RDPMC,  0),
    "OUT of an immediate port":       ("e67e",     {},                            IO,     0x7E0040),
    "IN of two bytes by DX":          ("66ed",     {"rdx": 0x3F8},                IO,     0x3F80009),
    "VMCALL in real mode":            ("0f01c1",   {"mode": "real"},              VMCALL, 0),
}
# fmt: on


@pytest.mark.parametrize("name", EXITS)
def test_instructions_that_exit(name):
    code, kwargs, reason, qualification = EXITS[name]
    info = info_of(code, **kwargs)
    assert (info.reason, info.qualification) == (reason, qualification)
    assert info.length == len(code) // 2
    assert info.by_instruction


# fmt: off
NO_EXITS = {
    "RDMSR at CPL 3":                 ("0f32",     {"cpl": 3},                        "CPL > 0"),
    "HLT that the guest may":         ("f4",       {"knobs": {"hlt_in_guest": True}}, "not asked for"),
    "MWAIT that the guest may":       ("0f01c9",   {"knobs": {"mwait_in_guest": True}}, "not asked for"),
    "INVLPG with EPT":                ("0f0138",   {},                                "not asked for"),
    "MOV CR3 with EPT":               ("0f22d8",   {},                                "not asked for"),
    "CR8 of an in-kernel APIC":       ("440f22c0", {"knobs": {"irqchip": True}},      "not asked for"),
    "MOV CR0 that changes TS only":   ("0f22c0",   {"rax": 0x8001003B},               "host owns"),
    "MOV CR4 of the same value":      ("0f22e0",   {"rax": 0x620},                    "host owns"),
    "LMSW that clears PE":            ("0f01f0",   {"rax": 0x2},                      "host owns"),
    "MOV from CR0":                   ("0f20c0",   {},                                "never exits"),
    "MOV to CR2":                     ("0f22d0",   {},                                "never exits"),
    "MOV to CR5":                     ("0f22e8",   {},                                "CR5 is #UD"),
    "MOV to DR9":                     ("440f23c8", {},                                "DR8 and above"),
    "CLTS":                           ("0f06",     {},                                "does not exit"),
    "LOCK CPUID":                     ("f00fa2",   {},                                "LOCK"),
    "PAUSE at CPL 3":                 ("f390",     {"cpl": 3},                        "CPL 0 only"),
    "XSETBV without OSXSAVE":         ("0f01d1",   {},                                "OSXSAVE"),
    "XSETBV with a prefix":           ("660f01d1", {},                                "does not exit"),
    "VMREAD with a prefix":           ("f20f7800", {},                                "does not exit"),
    "RDPMC at CPL 3":                 ("0f33",     {"cpl": 3},                        "CR4.PCE"),
    "a breakpoint":                   ("0fa2",     {"system": debug_registers(DR7 | 1, RIP)}, "breakpoint"),
    "real mode on virtual-8086 mode": ("f4",       {"mode": "real", "knobs": {"unrestricted_guest": False}},
                                                                                      "virtual-8086"),
}
# fmt: on


@pytest.mark.parametrize("name", NO_EXITS)
def test_instructions_that_do_not(name):
    code, kwargs, why = NO_EXITS[name]
    with pytest.raises(NoExitError, match=why):
        info_of(code, **({"rax": 0x1000} if code == "0f0138" else {}), **kwargs)


def test_a_guest_that_cannot_be_entered_does_not_exit():
    case = exit_case("0fa2", "prot32", knobs={"unrestricted_guest": False}, system={"tr": UNUSABLE})
    machine, _ = build_machine(case, {})
    with pytest.raises(NoExitError, match="cannot enter"):
        instruction_exit(machine)


@pytest.mark.parametrize("state", [{"flags": X86_EFLAGS_RF}, {"kvm": {"interruptibility": MOV_SS}}])
def test_rf_and_the_shadow_of_mov_ss_hold_a_breakpoint_back(state):
    info = info_of("0fa2", system=debug_registers(DR7 | 1, RIP), **state)
    assert info.reason == er.EXIT_REASON_CPUID


@pytest.mark.parametrize(
    ("mode", "code", "system", "address"),
    [
        ("prot32", "0f013d00900000", {"ds": LDT32}, 0xA000),
        ("prot32", "0f013d00900000", {"ds": UNUSABLE}, 0x9000),
        ("prot32", "650f013b", {"gs": LDT32}, 0x1FFF),
        ("prot64", "0f013b", {"ds": LDT32}, 1 << 50 | 0xFFF),
        ("prot64", "650f013b", {"gs": LDT32}, 1 << 50 | 0x1FFF),
    ],
)
def test_invlpg_reports_the_address_whatever_its_segment_allows(mode, code, system, address):
    rbx = (1 << 50 if mode == "prot64" else 0) | 0xFFF
    info = info_of(code, mode, system=system, knobs=SHADOW_PAGING, physical=True, rbx=rbx)
    assert (info.reason, info.qualification) == (er.EXIT_REASON_INVLPG, address)


def test_an_instructions_exit_saves_rf_as_0_and_others_leave_it():
    case = exit_case("0fa2", flags=X86_EFLAGS_RF)
    for by_instruction in (True, False):
        machine, _ = build_machine(case, {})
        info = ExitInfo(er.EXIT_REASON_CPUID, length=2)
        info.by_instruction = by_instruction
        hardware_exit(machine, info, {})
        assert bool(vmx_get_rflags(machine.vcpu) & X86_EFLAGS_RF) is not by_instruction


@pytest.mark.parametrize(("reason", "code", "kept"), [
    (er.EXIT_REASON_CR_ACCESS, "0f22d8", 0),
    (er.EXIT_REASON_HLT, "f4", 0),
    (er.EXIT_REASON_PREEMPTION_TIMER, "90", X86_EFLAGS_RF),
])  # fmt: skip
def test_so_does_a_described_exit_of_an_instruction(reason, code, kept):
    """That it does not say what the instruction makes it another exit of the same instruction."""
    machine, _ = build_machine(exit_case(code, flags=X86_EFLAGS_RF, rax=0x7000), {})
    enter_exit(machine, {"exit_reason": reason, "exit_qualification": 1 << 40})
    assert vmx_get_rflags(machine.vcpu) & X86_EFLAGS_RF == kept


def test_what_was_requested_before_the_entry_is_done():
    machine, _ = build_machine(exit_case("0fa2", kvm={"guest_debug": 1}), {})
    assert machine.vcpu.requests
    hardware_exit(machine, ExitInfo(er.EXIT_REASON_CPUID, length=2), {})
    assert not machine.vcpu.requests
