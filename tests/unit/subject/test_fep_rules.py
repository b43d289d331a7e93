"""Each rule about forced emulation on an instruction of its own, and on outcomes that are wrong."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from emufuzz.arch.regs import VCPU_SREG_DS
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Case, Memory, Outcome
from emufuzz.emulator.x86emul import EMULTYPE_TRAP_UD
from emufuzz.subject.fep_extra import predicted_extra
from emufuzz.subject.fep_rules import RULES, Prediction
from emufuzz.subject.fep_vectors import FepResult, fep_differences, fep_vector, forced_case, judge
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

TF, RF = 0x100, 0x10000
RIP = 0x6000
NONCANONICAL = 0x8000_0000_0000_0000
SYSENTER_CS, SYSENTER_EIP, PAT, EFER, TSC, TSC_AUX = 0x174, 0x176, 0x277, 0xC0000080, 0x10, 0xC0000103
MSRS = ((TSC, 0x1122334455667788), (SYSENTER_CS, 0), (SYSENTER_EIP, 0), (PAT, 0), (TSC_AUX, 7))
DR7_EXECUTE_0 = 0x402


def case_of(mode: str, code: str, *, vendor: str = "intel", **kwargs: Any) -> Case:
    """Hex `code`; members of the system state by name."""
    members = {name: kwargs.pop(name) for name in ("dr", "msr", "cr4", "efer", "cr0") if name in kwargs}
    system = build_system(mode, kwargs.get("cpl"), **members)
    case = build_case(mode, bytes.fromhex(code), system=system, rip=RIP, id="case", **kwargs)
    return msgspec.structs.replace(case, vendor=vendor)


def wrmsr(index: int, value: int, **kwargs: Any) -> Case:
    return case_of("prot64", "0f30", rcx=index, rax=value & 0xFFFFFFFF, rdx=value >> 32, msr=MSRS, **kwargs)


def not_accessed() -> Case:
    """A real-mode DS without the accessed bit, which a load keeps."""
    ds = msgspec.structs.replace(build_system("real").seg[VCPU_SREG_DS], type=2)
    system = build_system("real", ds=ds)
    return build_case("real", bytes.fromhex("8ed8"), system=system, rip=RIP, id="case", rax=3)


def lone_code_page(case: Case) -> Case:
    """Nothing in the page of the prefix, which is the one before the code."""
    entries = tuple(entry for entry in case.mem.entries if entry[0] >> 12 != RIP - 5 >> 12)
    return msgspec.structs.replace(case, mem=Memory(entries))


LMA_OFF = build_system("prot64").efer & ~0x400

#: Rule -> a case in which it is the only one that applies.
CASES: dict[str, Case] = {
    "code-breakpoint": case_of("prot32", "90", dr=(RIP, 0, 0, 0, 0, 0, 0xFFFF0FF0, DR7_EXECUTE_0)),
    "prefix-seen": case_of("prot32", "8a03", rbx=RIP - 5),
    "outs-once": case_of("prot32", "f36e", rcx=3, rsi=0x8000, rdx=0x80),
    "decode-fault": case_of("prot32", "d9e8"),
    "emulation-failure": case_of("prot32", "cd80"),
    "sysenter-msr": wrmsr(SYSENTER_EIP, NONCANONICAL | 0x1234),
    "tsc-aux": wrmsr(TSC_AUX, 0x5_0000_0006, vendor="amd"),
    "msr-refused": wrmsr(PAT, 0x0707070707070702),
    "msr-exists": case_of("prot64", "0f32", rcx=1, rax=5, rdx=6),
    "vmware-pmc": case_of("prot64", "0f33", rcx=0x10000, msr=MSRS),
    "lma-follows-pg": case_of("prot32", "0f22c0", rax=0x80000031, efer=0x100, cr0=0x80000011),
    "cpuid-bits": case_of("prot64", "0fa2", rax=1, cr4=0x40620),
    "hypercall-bytes": case_of("prot64", "0f01c1", vendor="amd"),
    "accessed-bit": not_accessed(),
    "single-step": case_of("prot64", "01d8", flags=TF, rax=1, rbx=2),
}


def through_kvm(case: Case) -> FepResult:
    (recorded,) = FlatSubject(events=True).run([case])
    (outcome,) = KvmSubject().run([forced_case(case, recorded)])
    return judge(case, recorded, outcome)


def tampered(outcome: Outcome) -> dict[str, Outcome]:
    """The outcome with one thing changed, by the name of the field that must be found to differ."""
    page = dict(outcome.pages)
    page[0x9] = b"\x5a" * 4096
    extra: dict[str, Any] = outcome.extra or {}
    system = outcome.system
    changes: dict[str, dict[str, Any]] = {
        "rc": {"rc": "retry_instr"},
        "exception": {"exception": (17, 0, None)},
        "rip": {"rip": outcome.rip ^ 1},
        "rflags": {"rflags": outcome.rflags ^ 1},
        "gpr": {"gpr": (outcome.gpr[0] ^ 1, *outcome.gpr[1:])},
        "restarts": {"restarts": outcome.restarts + 1},
        "interruptibility": {"interruptibility": 2},
        "mem": {"pages": page},
        "cr2": {"system": msgspec.structs.replace(system, cr2=system.cr2 ^ 1)},
        "msr": {"system": msgspec.structs.replace(system, msr=(*system.msr, (0x8B, 1)))},
        "seg": {"system": msgspec.structs.replace(system, seg=(*system.seg[:7], system.seg[0]))},
        "injected": {"extra": extra | {"injected": [*extra["injected"], {"vector": 3}]}},
        "exits": {"extra": extra | {"exits": [*extra["exits"], {"reason": "SHUTDOWN"}]}},
        "device_trace": {"extra": extra | {"device_trace": [{"kind": "pio"}]}},
        "interrupt_shadow": {"extra": extra | {"interrupt_shadow": extra["interrupt_shadow"] ^ 1}},
        "livelock": {"extra": extra | {"livelock": True}},
        "crash": {"crash": "ValueError"},
    }
    return {name: msgspec.structs.replace(outcome, **fields) for name, fields in changes.items()}


def test_there_is_a_case_for_every_rule() -> None:
    assert list(CASES) == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_alone_explains_what_kvm_does(rule: str) -> None:
    result = through_kvm(CASES[rule])
    assert (result.rules, result.differences) == ([rule], [])


@pytest.mark.parametrize("rule", RULES)
def test_without_the_rule_the_vector_differs(rule: str) -> None:
    case = CASES[rule]
    result = through_kvm(case)
    (recorded,) = FlatSubject(events=True).run([case])
    assert fep_differences(result.vector, result.outcome, Prediction(case, recorded)) != []


@pytest.mark.parametrize("rule", RULES)
def test_a_wrong_outcome_is_not_explained(rule: str) -> None:
    result = through_kvm(CASES[rule])
    for field, outcome in tampered(result.outcome).items():
        assert fep_differences(result.vector, outcome, result.prediction) == [field]


@pytest.mark.parametrize("rule", RULES)
def test_what_the_emulator_alone_does_is_not_accepted_in_its_stead(rule: str) -> None:
    case = CASES[rule]
    (recorded,) = FlatSubject(events=True).run([case])
    vector = fep_vector(case)
    plain = msgspec.structs.replace(recorded, extra=predicted_extra(vector, Prediction(case, recorded)))
    assert judge(case, recorded, plain).differences != []


# -- where a rule must not apply -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        case_of("prot32", "90", flags=RF, dr=(RIP, 0, 0, 0, 0, 0, 0xFFFF0FF0, DR7_EXECUTE_0)),
        case_of("prot32", "90", dr=(RIP - 5, 0, 0, 0, 0, 0, 0xFFFF0FF0, DR7_EXECUTE_0)),
        case_of("prot32", "90", dr=(RIP, 0, 0, 0, 0, 0, 0xFFFF0FF0, DR7_EXECUTE_0 | 1 << 16)),
        case_of("prot32", "8a03", rbx=0x8000),
        case_of("prot32", "f36e", rcx=1, rsi=0x8000, rdx=0x80),
        case_of("prot32", "f36c", rcx=3, rdi=0x8000, rdx=0x80),
        case_of("prot32", "ee", flags=TF, rdx=0x80),
        wrmsr(SYSENTER_EIP, 0x1234),
        wrmsr(TSC_AUX, 0x5_0000_0006),
        wrmsr(PAT, 0x0007040600070406),
        wrmsr(EFER, build_system("prot64").efer),
        case_of("prot64", "0f32", rcx=2),
        case_of("prot64", "0f33", rcx=0x10000, cpl=3),
        case_of("prot64", "0f33", rcx=1),
        case_of("prot64", "0fa2", rax=1),
        case_of("prot64", "0f01c1"),
        case_of("prot64", "fb"),
        case_of("prot64", "8ed0", rax=build_system("prot64").seg[2].sel),
    ],
    ids=lambda case: case.code.hex(),
)
def test_nothing_to_explain(case: Case) -> None:
    result = through_kvm(case)
    assert (result.rules, result.differences) == ([], [])


def test_the_page_of_the_prefix_exists_for_the_instruction() -> None:
    case = lone_code_page(case_of("prot32", "8a03", rbx=0x5000))
    result = through_kvm(case)
    assert (result.rules, result.differences) == (["prefix-seen"], [])
    assert result.vector.new_pages == (5,)
    assert (result.outcome.rc, result.prediction.outcome.rip) == ("continue", RIP + 2)


def test_a_failure_leaves_for_userspace_at_cpl_0_only() -> None:
    kernel, user = through_kvm(CASES["emulation-failure"]), through_kvm(case_of("prot32", "cd80", cpl=3))
    assert (user.rules, user.differences) == (["emulation-failure"], [])
    assert [(entry["reason"]) for entry in (kernel.outcome.extra or {})["exits"]] == ["INTERNAL_ERROR"]
    assert (user.outcome.extra or {})["exits"] == []
    assert kernel.outcome.rc == user.outcome.rc == "unhandleable"
    assert kernel.outcome.exception == user.outcome.exception == (6, None, None)


def test_a_return_to_an_outer_level_fails_without_an_exit() -> None:
    frame = (0x6000).to_bytes(4, "little") + build_system("prot32", 3).seg[1].sel.to_bytes(4, "little")
    result = through_kvm(case_of("prot32", "cb", cpl=1, rsp=0x8000, data={0x8000: frame}))
    assert (result.rules, result.differences) == (["emulation-failure"], [])
    assert (result.outcome.rc, (result.outcome.extra or {})["exits"]) == ("unhandleable", [])


def test_an_efer_bit_of_amds_is_refused() -> None:
    result = through_kvm(wrmsr(EFER, build_system("prot64").efer | 0x1000))
    assert (result.rules, result.differences) == (["msr-refused"], [])
    assert result.outcome.exception == (13, 0, None)


def test_sysenter_cs_keeps_32_bits() -> None:
    result = through_kvm(wrmsr(SYSENTER_CS, 0x1_0000_0008))
    assert (result.rules, result.differences) == (["sysenter-msr"], [])
    assert dict(result.outcome.system.msr)[SYSENTER_CS] == 8


# -- conversion ------------------------------------------------------------------------------------------


def test_trap_ud_enters_without_the_prefix() -> None:
    case = msgspec.structs.replace(case_of("prot64", "01d8"), emul_type=EMULTYPE_TRAP_UD)
    (recorded,) = FlatSubject(events=True).run([case])
    forced = forced_case(case, recorded)
    assert (forced.path, forced.code, forced.rip, forced.emul_type) == ("ud", case.code, RIP, 0)
    result = through_kvm(case)
    assert (result.rules, result.differences) == (["decode-fault"], [])


@pytest.mark.parametrize("rip", [0, 5])
def test_the_prefix_may_end_with_the_address_space(rip: int) -> None:
    case = case_of("prot32", "01d8", rax=1, rbx=2)
    case = msgspec.structs.replace(case, rip=rip, mem=Memory(((0, b""), (0xFFFFF000, b""))))
    result = through_kvm(case)
    assert (result.rules, result.differences) == ([], [])
    assert (result.outcome.rip, result.outcome.gpr[0]) == (rip + 2, 3)


def test_a_cr4_bit_that_the_recording_sets_is_a_feature_of_the_guest() -> None:
    umip = build_system("prot64").cr4 | 0x800
    result = through_kvm(case_of("prot64", "0f22e0", rax=umip))
    assert (result.rules, result.differences) == ([], [])
    assert result.outcome.system.cr4 == umip
