"""Every path is entered through the exit that hardware would have raised, or says why not."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.exits import exit_case
from support.machine_cases import RW, TARGET, A, D, P, physical
from support.machines import FEP, enter, exits, mmio, path_case, reg, run_path

from emufuzz.arch.exceptions import PFERR_RSVD, UD_VECTOR
from emufuzz.case.build import build_case, build_segments
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome, TableRegister
from emufuzz.case.paths import PATHS
from emufuzz.case.segments import segment_data
from emufuzz.kvm import emultype as et
from emufuzz.kvm import exit_memory
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import exits as exits_module
from emufuzz.kvm import machine as machine_module
from emufuzz.kvm.options import options_from_knobs
from emufuzz.kvm.vcpu import MP_STATE_HALTED
from emufuzz.kvm.x86 import x86_emulate_instruction
from emufuzz.subject.kvm import KvmSubject
from emufuzz.subject.kvm.paths import PATH_SPECS

HOLE = 0xB000
DEVICE = [mmio(HOLE, reads="01020304")]
#: A data segment as "unreal mode" has it, which virtual-8086 mode does not allow.
BIG = msgspec.structs.replace(build_segments("real", 0)["ds"], limit=0xFFFFFFFF, g=1)
IVT = {0x3000: bytes.fromhex("00700000") * 64}


def exit_events(path: str, *args: Any, **kwargs: Any) -> tuple[list[int], Outcome]:
    """The VM exits of a case, in order, and its outcome."""
    subject = KvmSubject(trace=True)
    case = path_case(path, *args, **kwargs)
    subject.check(case)
    [outcome] = subject.run([case])
    assert not outcome.crash
    assert subject.trace is not None
    return [e.fields["exit_reason"] for e in subject.trace.events if e.name == "kvm_exit"], outcome


def no_exit(*args: Any, **kwargs: Any) -> str:
    """Why a case does not take its path."""
    outcome = run_path(*args, **kwargs)
    assert (outcome.rc, outcome.decode_rc) == ("unhandleable", "failed")
    why = (outcome.extra or {})["no_exit"]
    assert outcome.reason == f"no exit: {why}"
    return str(why)


def test_the_paths_are_those_of_the_exchange_format() -> None:
    assert tuple(PATH_SPECS) == PATHS
    for spec in PATH_SPECS.values():
        options_from_knobs(spec.knobs)


# -- one test per path -----------------------------------------------------------------------------


def test_ud() -> None:
    reasons, outcome = exit_events("ud", "prot64", "0f38f000", rax=0x8000, data={0x8000: b"\1\2\3\4"})
    assert (reasons, reg(outcome, "rax"), outcome.rip) == ([0], 0x01020304, 0x6004)


def test_fep() -> None:
    reasons, outcome = exit_events("fep", "prot64", "48ffc0")
    assert (reasons, reg(outcome, "rax"), outcome.rip) == ([0], 1, 0x6008)


def test_vmware_gp() -> None:
    reasons, outcome = exit_events("vmware-gp", "prot64", "ed", cpl=3, rdx=0x5658, port_in=b"\1\2\3\4")
    assert (reasons, reg(outcome, "rax"), exits(outcome)) == ([0], 0x04030201, ["IO"])


def test_rmode_exception() -> None:
    reasons, outcome = exit_events("rmode-exception", "real", "fa", flags=0x200)
    assert (reasons, outcome.rflags & 0x200, outcome.rip) == ([0], 0, 0x6001)


def test_shadow_pf() -> None:
    reasons, outcome = exit_events("shadow-pf", "real", "a100b0", devices=DEVICE)
    assert set(reasons) == {0}
    assert len(reasons) > 1  # the code's page comes first
    assert (reg(outcome, "rax"), exits(outcome)) == (0x0201, ["MMIO"])


@pytest.mark.parametrize("kind", ["2-level", "pae", "4-level"])
@pytest.mark.parametrize(("code", "rc", "length"), [("0f9007", "retry_instr", 0), ("8907", "continue", 2)])
def test_shadow_pf_of_a_page_table(kind: str, code: str, rc: str, length: int) -> None:
    """KVM gives up the shadow of the table, and the guest repeats what is no usual way to write one.

    KVM: retry_instruction, x86_page_table_writing_insn, which knows MOV.
    """
    directory = {"2-level": 0x100000, "pae": 0x101000, "4-level": 0x102000}[kind]
    case = physical(kind, code, [(0, directory | P | RW | A | D)], rdi=TARGET + 0xE00)
    (outcome,) = KvmSubject().run([msgspec.structs.replace(case, path="shadow-pf")])
    assert (outcome.rc, outcome.rip - case.rip, outcome.exception) == (rc, length, None)
    assert outcome.extra is not None
    assert outcome.extra["exits"] == []


def test_ept_violation() -> None:
    reasons, outcome = exit_events("ept-violation", "prot64", "8b00", rax=HOLE, devices=DEVICE)
    assert reasons == [er.EXIT_REASON_EPT_VIOLATION] * 2
    assert (reg(outcome, "rax"), exits(outcome)) == (0x04030201, ["MMIO"])


def test_ept_violation_maxphyaddr() -> None:
    kvm = {"cpuid": {"maxphyaddr": 36}, "guest_physical_address": 1 << 40}
    reasons, outcome = exit_events("ept-violation-maxphyaddr", "prot64", "8b00", rax=0x8000, kvm=kvm)
    assert (reasons, outcome.rip) == ([er.EXIT_REASON_EPT_VIOLATION], 0x6002)


def test_ept_misconfig() -> None:
    reasons, outcome = exit_events("ept-misconfig", "prot64", "8b00", rax=HOLE, devices=DEVICE)
    assert reasons == [er.EXIT_REASON_EPT_MISCONFIG]
    assert (reg(outcome, "rax"), outcome.rip) == (0x04030201, 0x6002)


def test_io_string() -> None:
    reasons, outcome = exit_events("io-string", "prot64", "6c", rdx=0x60, rdi=0x8000, port_in=b"\x42")
    assert (reasons[-1], outcome.rip) == (er.EXIT_REASON_IO_INSTRUCTION, 0x6001)
    assert outcome.pages[8][0] == 0x42


def test_apic_access() -> None:
    reasons, outcome = exit_events("apic-access", "prot64", "8b00", rax=0xFEE00030)
    assert (reasons[-1], reg(outcome, "rax") & 0xFF) == (er.EXIT_REASON_APIC_ACCESS, 0x14)


@pytest.mark.parametrize(
    ("code", "reason"), [("0f0100", er.EXIT_REASON_GDTR_IDTR), ("0f00c8", er.EXIT_REASON_LDTR_TR)]
)
def test_desc(code: str, reason: int) -> None:
    reasons, outcome = exit_events("desc", "prot64", code, rax=0x8000, cr4=0x620 | 1 << 11)
    assert (reasons[-1], outcome.rip) == (reason, 0x6003)


def test_invalid_guest_state() -> None:
    reasons, outcome = exit_events("invalid-guest-state", "real", "40", es=BIG)
    assert (reasons, reg(outcome, "rax"), exits(outcome)) == ([], 1, ["INTR"])


def test_an_exception_that_cannot_be_delivered_is_a_failure_of_the_run() -> None:
    ss = segment_data(0x2B, bits=32, dpl=3)  # another privilege level than CS has
    _, outcome = exit_events("invalid-guest-state", "prot32", "40", ss=ss, kvm={"pending": {"vector": 6}})
    assert (exits(outcome), reg(outcome, "rax"), outcome.rc) == (["INTERNAL_ERROR"], 0, "unhandleable")


def test_task_switch() -> None:
    task = bytes.fromhex("6700005000890000")
    tss = bytearray(104)
    tss[28:32] = (0x100000).to_bytes(4, "little")
    tss[32:40] = (0x7000).to_bytes(4, "little") + (2).to_bytes(4, "little")
    for offset, selector in zip(range(72, 96, 4), (0x28, 8, 0x28, 0x28, 0x28, 0x28), strict=True):
        tss[offset : offset + 2] = selector.to_bytes(2, "little")
    data = {0x1078: task, 0x5000: bytes(tss)}
    kvm = {"exit_qualification": 2 << 30 | 0x78, "instruction_length": 7}
    gdtr = TableRegister(0x1000, 0xFFF)
    reasons, outcome = exit_events("task-switch", "prot32", "ea000000007800", data=data, gdtr=gdtr, kvm=kvm)
    assert (reasons, outcome.rip, outcome.system.seg[6].sel) == ([er.EXIT_REASON_TASK_SWITCH], 0x7000, 0x78)


@pytest.mark.parametrize(
    ("kvm", "rsp"),
    [
        ({"pending": {"vector": 0}}, 0xC7FA),
        ({"interrupt": {"vector": 0x20}}, 0xC7FA),
        ({"nmi": 1}, 0xC7FA),
    ],
)
def test_rmode_inject(kvm: dict[str, Any], rsp: int) -> None:
    reasons, outcome = exit_events("rmode-inject", "real", "90", data=IVT, rsp=0xC800, kvm=kvm)
    assert (reasons, outcome.rip, reg(outcome, "rsp")) == ([], 0x7000, rsp)
    assert (outcome.extra or {})["injected"] == []  # it is delivered, and not queued any more


def test_a_soft_interrupt_returns_behind_its_instruction() -> None:
    kvm = {"interrupt": {"vector": 0x20, "soft": True}, "instruction_length": 2}
    _, outcome = exit_events("rmode-inject", "real", "cd20", data=IVT, rsp=0xC800, kvm=kvm)
    assert outcome.pages[0xC][0x7FA:0x7FC] == (0x6002).to_bytes(2, "little")


def test_io_completion() -> None:
    reasons, outcome = exit_events("io-completion", "prot64", "8b00", rax=HOLE, devices=DEVICE)
    assert (reasons[-1], reg(outcome, "rax")) == (er.EXIT_REASON_EPT_MISCONFIG, 0x04030201)
    reasons, outcome = exit_events("io-completion", "prot64", "6c", rdx=0x60, rdi=0x8000, port_in=b"\x42")
    assert (reasons[-1], outcome.pages[8][0]) == (er.EXIT_REASON_IO_INSTRUCTION, 0x42)


@pytest.mark.parametrize("mode", ["real", "prot32"])
def test_io_completion_with_shadow_tables(mode: str) -> None:
    """An entry with reserved bits makes the hole known: the last #PF has RSVD, and alone is emulated."""
    subject = KvmSubject(trace=True)
    made = build_case(mode, b"\x8b\x03", rbx=HOLE, physical=True, data={HOLE: b""})
    phys = [entry for entry in (made.extra or {})["phys"] if entry["addr"] != hex(HOLE)]
    kvm = {"knobs": {"ept": False, "host_maxphyaddr": 46}}
    extra = {"phys": phys, "devices": DEVICE, "kvm": kvm}
    [outcome] = subject.run([msgspec.structs.replace(made, path="io-completion", extra=extra)])
    assert subject.trace is not None
    exited = [e.fields for e in subject.trace.events if e.name == "kvm_exit"]
    assert {fields["exit_reason"] for fields in exited} == {er.EXIT_REASON_EXCEPTION_NMI}
    assert exited[-1]["error_code"] & PFERR_RSVD
    assert len([e for e in subject.trace.events if e.name == "kvm_emulate_insn"]) == 1
    assert (exits(outcome), reg(outcome, "rbx")) == (["MMIO"], HOLE)


def test_msr_completion() -> None:
    msr = ((0x12345, 0x1122334455667788),)
    reasons, outcome = exit_events("msr-completion", "prot64", "0f32", rcx=0x12345, msr=msr)
    assert (reasons, exits(outcome), outcome.rip) == ([0], ["X86_RDMSR"], 0x6007)
    assert (reg(outcome, "rax"), reg(outcome, "rdx")) == (0x55667788, 0x11223344)


def test_skip() -> None:
    reasons, outcome = exit_events(
        "skip", "prot64", "8900", rax=HOLE, devices=DEVICE, kvm={"ioeventfds": [{"addr": HOLE}]}
    )
    assert (reasons, outcome.rip, exits(outcome)) == ([er.EXIT_REASON_EPT_MISCONFIG], 0x6002, [])


@pytest.mark.parametrize(
    "reason", sorted(set(exits_module.KVM_VMX_EXIT_HANDLERS) - {er.EXIT_REASON_EPT_VIOLATION})
)
def test_exit_comes_to_the_handler_of_its_reason(monkeypatch: pytest.MonkeyPatch, reason: int) -> None:
    seen: list[int] = []

    def handler(machine: Any) -> int:
        seen.append(machine.vcpu.exit_reason)
        return 1

    monkeypatch.setitem(exits_module.KVM_VMX_EXIT_HANDLERS, reason, handler)
    reasons, _ = exit_events("exit", "prot64", "90", kvm={"exit_reason": reason})
    assert reasons[-1] == reason
    fast = reason in (er.EXIT_REASON_PREEMPTION_TIMER, er.EXIT_REASON_HLT)
    assert seen == ([] if fast else [reason])


def test_exit() -> None:
    reasons, outcome = exit_events("exit", "prot64", "0fa2")
    assert (reasons[-1], outcome.rip) == (er.EXIT_REASON_CPUID, 0x6002)
    reasons, outcome = exit_events("exit", "prot64", "0fa2", kvm={"exit_reason": 10})
    assert (reasons[-1], outcome.rip) == (er.EXIT_REASON_CPUID, 0x6002)
    reasons, outcome = exit_events("exit", "prot64", "f4", knobs={"irqchip": True})
    assert (reasons[-1], outcome.rip) == (er.EXIT_REASON_HLT, 0x6001)


def test_a_request_takes_the_fastpath_through_the_slow_path() -> None:
    vm = enter("exit", "prot64", "90", kvm={"exit_reason": er.EXIT_REASON_PREEMPTION_TIMER, "nmi": 1})
    assert not vm.left
    assert (vm.rip, vm.vcpu.nmi_pending) == (0x6000, 1)


def test_hlt_may_sleep_in_the_kernel() -> None:
    vm = enter("exit", "prot64", "f4", knobs={"irqchip": True})
    assert vm.vcpu.mp_state == MP_STATE_HALTED
    assert not vm.left


# -- the bits that the emulator is entered with ----------------------------------------------------

MAX36 = {"cpuid": {"maxphyaddr": 36}, "guest_physical_address": 1 << 40}
MSR = {"rcx": 0x12345, "msr": ((0x12345, 1),)}
READ_ONLY = {"memslots": [{"base": 0, "size": 0x8000}, {"base": 0x8000, "size": 0x1000, "flags": 2}]}
EVENTFD = {"ioeventfds": [{"addr": HOLE}]}
LOAD = {"rax": HOLE, "devices": DEVICE}


@pytest.mark.parametrize(
    ("path", "mode", "code", "state", "bits"),
    [
        ("ud", "prot64", "0f0b", {}, [et.EMULTYPE_TRAP_UD]),
        ("fep", "prot64", "90", {}, [et.EMULTYPE_TRAP_UD_FORCED]),
        ("vmware-gp", "prot64", "ef", {"rdx": 0x5658}, [et.EMULTYPE_VMWARE_GP]),
        ("rmode-exception", "real", "fa", {}, [0]),
        ("shadow-pf", "real", "a300b0", {"devices": DEVICE}, [et.EMULTYPE_PF]),
        ("ept-violation", "prot64", "8900", LOAD, [et.EMULTYPE_PF]),
        ("ept-violation-maxphyaddr", "prot64", "8b00", {"rax": 0x8000, "kvm": MAX36}, [0]),
        ("ept-misconfig", "prot64", "8900", LOAD, [et.EMULTYPE_PF]),
        ("io-string", "prot64", "6e", {"rsi": 0x8000}, [0]),
        ("apic-access", "prot64", "8b00", {"rax": 0xFEE00030}, [0]),
        ("desc", "prot64", "0f0100", {"rax": 0x8000, "cr4": 0xE20}, [0]),
        ("invalid-guest-state", "real", "40", {"es": BIG}, [0]),
        ("io-completion", "prot64", "8b00", LOAD, [et.EMULTYPE_PF, et.EMULTYPE_NO_DECODE]),
        (
            "msr-completion", "prot64", "0f32", MSR,
            [
                et.EMULTYPE_TRAP_UD_FORCED,
                et.EMULTYPE_NO_DECODE | et.EMULTYPE_SKIP | et.EMULTYPE_COMPLETE_USER_EXIT,
            ],
        ),
        ("skip", "prot64", "8900", LOAD | {"kvm": EVENTFD}, [et.EMULTYPE_SKIP]),
    ],
)  # fmt: skip
def test_emulation_type(
    monkeypatch: pytest.MonkeyPatch, path: str, mode: str, code: str, state: dict[str, Any], bits: list[int]
) -> None:
    seen: list[int] = []

    def record(machine: Any, cr2_or_gpa: int, emulation_type: int) -> int:
        seen.append(emulation_type)
        return x86_emulate_instruction(machine, cr2_or_gpa, emulation_type)

    for module in (machine_module, exit_memory):
        monkeypatch.setattr(module, "x86_emulate_instruction", record)
    run_path(path, mode, code, **state)
    assert seen == bits


# -- why there is no exit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "mode", "code", "state", "why"),
    [
        ("rmode-exception", "prot64", "90", {}, "not in real mode"),
        ("rmode-inject", "prot32", "90", {"kvm": {"nmi": 1}}, "not in real mode"),
        ("rmode-inject", "real", "90", {}, "no event to inject"),
        ("invalid-guest-state", "real", "90", {}, "hardware can enter the guest"),
        ("rmode-exception", "real", "fa", {"es": BIG}, "hardware cannot enter the guest"),
        ("task-switch", "prot32", "90", {}, "which task"),
        ("ept-violation", "prot64", "90", {}, "accesses nothing that exits"),
        ("ept-violation", "prot64", "8b00", {"rax": HOLE}, "#PF at 0xb000"),
        ("ept-violation", "prot64", "ec", {"rdx": 0x60}, "accesses nothing that exits"),
        ("ept-misconfig", "prot64", "90", {}, "accesses nothing that exits"),
        ("shadow-pf", "prot32", "8b00", {"rax": 0xD000, "physical": True}, "gets its own #PF"),
        ("shadow-pf", "real", "a100d0", {}, "#PF at 0xd000 and no exit"),
        ("apic-access", "prot64", "8b00", {"rax": HOLE, "devices": DEVICE}, "the exit is EPT_VIOLATION"),
        ("io-string", "prot64", "ec", {"rdx": 0x60}, "do not need the emulator"),
        ("io-string", "prot64", "90", {}, "does not exit"),
        ("io-string", "prot64", "6e", {"rsi": HOLE, "devices": DEVICE, "rdx": 0x60}, "memory exits first"),
        ("io-string", "prot64", "6e", {"rsi": HOLE, "rdx": 0x60}, "#PF at 0xb000"),
        ("io-completion", "prot64", "90", {}, "does not exit"),
        ("desc", "prot64", "90", {"cr4": 0xE20}, "descriptor-table register"),
        ("desc", "prot64", "0f01c1", {"cr4": 0xE20}, "descriptor-table register"),
        ("desc", "prot64", "0f0138", {"cr4": 0xE20}, "descriptor-table register"),
        ("skip", "prot64", "8900", {"rax": HOLE, "devices": DEVICE}, "no ioeventfd"),
        ("exit", "real", "0f0136f4", {"rip": 0xFFFC}, "last bytes cannot be fetched"),
        ("desc", "prot64", "0f", {"rip": 0xAFFF, "devices": DEVICE, "cr4": 0xE20}, "cannot be fetched"),
        ("io-completion", "prot64", "8900", {"rax": 0x8000, "kvm": READ_ONLY}, "memory exits first"),
        ("exit", "prot64", "90", {}, "does not exit"),
        ("exit", "prot64", "0f06", {"kvm": {"exit_reason": 28, "exit_qualification": 0x20}}, "owns CR0.TS"),
        ("exit", "prot64", "f4", {"cpl": 3}, "CPL > 0"),
    ],
)
def test_why_there_is_no_exit(path: str, mode: str, code: str, state: dict[str, Any], why: str) -> None:
    assert why in no_exit(path, mode, code, **state)


@pytest.mark.parametrize("path", ["fep", "msr-completion"])
def test_only_ud2_is_undefined_for_every_processor(path: str) -> None:
    case = msgspec.structs.replace(path_case(path, code="0fa3c0"), code=bytes.fromhex("0fa3c0f4"))
    [outcome] = KvmSubject().run([case])
    assert outcome.reason == "no exit: the instruction is not UD2"
    [outcome] = KvmSubject().run([msgspec.structs.replace(case, code=bytes.fromhex("0f0bf4"))])
    assert outcome.exception == (UD_VECTOR, None, None)


@pytest.mark.parametrize(
    "path", ["ud", "fep", "msr-completion", "desc", "io-string", "exit", "io-completion", "ept-violation"]
)
def test_code_that_is_absent_faults_before_anything_else(path: str) -> None:
    vm_state = {"cr4": 0x620 | 1 << 11, "physical": True}
    case = path_case(path, "prot64", "90", **vm_state)
    case = msgspec.structs.replace(case, rip=0xD000)  # no table maps it
    [outcome] = KvmSubject().run([case])
    assert "#PF at 0xd000" in (outcome.extra or {})["no_exit"]


# -- the subject -----------------------------------------------------------------------------------


def test_cases_without_path_or_with_scripts_are_refused() -> None:
    subject = KvmSubject()
    with pytest.raises(UnsupportedCaseError, match="path: the KVM model"):
        subject.check(exit_case())
    scripted = path_case("fep")
    scripted = msgspec.structs.replace(scripted, extra={**(scripted.extra or {}), "callbacks": []})
    with pytest.raises(UnsupportedCaseError, match="callbacks: KVM has its own"):
        subject.check(scripted)
    assert subject.fingerprint().keys() == {"subject", "emufuzz"}


def test_a_python_exception_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_machine: object, _kvm: object) -> int:
        raise KeyError(5)

    monkeypatch.setitem(PATH_SPECS, "fep", PATH_SPECS["fep"]._replace(enter=broken))
    bad, good = KvmSubject().run([path_case("fep"), path_case("ud", "prot64", "0f0b")])
    assert "KeyError" in bad.crash
    assert (good.crash, good.exception) == ("", (6, None, None))


def test_a_knob_of_the_case_ranks_above_the_paths() -> None:
    outcome = run_path("fep", "prot64", "48ffc0", knobs={"force_emulation_prefix": 0})
    assert outcome.exception == (6, None, None)
    assert path_case("fep").code.startswith(bytes.fromhex(FEP))


def test_an_instruction_that_never_gets_on_is_a_livelock() -> None:
    outcome = run_path("ept-violation", "prot64", "0f0110", rax=HOLE, devices=DEVICE)  # LGDT from a device
    assert (outcome.extra or {})["livelock"] is True
    assert outcome.rip == 0x6000
    outcome = run_path("ept-violation", "prot64", "8b00", rax=HOLE, devices=DEVICE)
    assert "livelock" not in (outcome.extra or {})


@pytest.mark.parametrize(
    ("l1", "code", "exception"),
    [
        ({"exception_bitmap": 1 << 14}, "8907", (14, 2, HOLE)),
        ({"page_fault_error_code_match": 1}, "8907", (14, 2, HOLE)),
        ({"exception_bitmap": 1 << 13}, "8ed8", (13, 0xFFF8, None)),
        ({}, "8907", (14, 2, HOLE)),
    ],
)
def test_an_exception_that_l1_takes_is_what_the_instruction_raised(
    l1: dict[str, Any], code: str, exception: tuple[int, int, int | None]
) -> None:
    """Queued for an exit to L1 or for the guest, it is in the outcome (a write to a hole, MOV DS)."""
    outcome = run_path("fep", "prot32", code, rdi=HOLE, rax=0xFFF8, kvm={"guest_mode": l1})
    assert (outcome.exception, outcome.rc) == (exception, "propagate_fault")
