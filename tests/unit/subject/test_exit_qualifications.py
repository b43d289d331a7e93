"""Which exit an instruction makes, and what it reports: SDM Vol. 3C Tables 28-3, 28-4 and 28-5."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from support.exits import Exited

from emufuzz.case.build import build_segments
from emufuzz.case.segments import segment_data
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.vmx_bits import CPU_BASED_INVLPG_EXITING, CPU_BASED_MOV_DR_EXITING
from emufuzz.subject.kvm.enter import ExitInfo
from emufuzz.subject.kvm.instruction_exits import NoExitError, instruction_exit, port_exit
from emufuzz.subject.kvm.probe import Probe

SHADOW = {"ept": False, "host_maxphyaddr": 46}
OSXSAVE = 0x620 | 1 << 18


def exit_of(mode: str, code: str, **kwargs: Any) -> ExitInfo:
    """The exit of an instruction when KVM has mapped all memory."""
    vm = Exited(mode, code, **kwargs)
    for page in (6, 7, 8, 9, 0xA, 0xC):
        vm.exit(er.EXIT_REASON_EPT_VIOLATION, 0x187, guest_physical_address=page << 12)
    return instruction_exit(vm.machine)


def fields(info: ExitInfo) -> tuple[int, int, int]:
    return info.reason, info.qualification, info.length


# -- control registers (Table 28-3) ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "qualification", "state"),
    [
        ("0f22c3", 0 | 3 << 8, {"rbx": 0x80000033 ^ 1 << 29}),  # MOV CR0, RBX that sets CR0.NW
        ("0f22e3", 4 | 3 << 8, {"rbx": 0xE20}),  # MOV CR4, RBX that sets UMIP
        ("440f22c3", 8 | 3 << 8, {}),  # MOV CR8, RBX
        ("440f20c3", 8 | 1 << 4 | 3 << 8, {}),  # MOV RBX, CR8
        ("450f20c7", 8 | 1 << 4 | 15 << 8, {}),  # MOV R15, CR8
        ("0f01f3", 3 << 4 | 0x8035 << 16, {"rbx": 0x12348035}),  # LMSW BX, which sets EM
        (
            "0f0133",
            3 << 4 | 1 << 6 | 0xBEEE << 16,
            {"rbx": 0x8000, "data": {0x8000: b"\xee\xbe"}},
        ),  # from memory
    ],
)
def test_control_register_accesses(code: str, qualification: int, state: dict[str, Any]) -> None:
    assert fields(exit_of("prot64", code, **state)) == (28, qualification, len(code) // 2)


@pytest.mark.parametrize(("code", "qualification"), [("0f22db", 3 | 3 << 8), ("0f20db", 3 | 1 << 4 | 3 << 8)])
def test_cr3_exits_without_ept(code: str, qualification: int) -> None:
    vm = Exited("real", code, knobs=SHADOW)
    vm.exception(14, 0, 0x6000)
    with pytest.raises(NoExitError, match="virtual-8086"):
        instruction_exit(vm.machine)
    vm = Exited("prot32", code, knobs=SHADOW, cr0=0x31, physical=True)  # without paging
    vm.exception(14, 0, 0x6000)
    assert fields(instruction_exit(vm.machine)) == (28, qualification, 3)


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("0f22db", {}, "not asked for"),  # CR3 with EPT
        ("0f20db", {}, "not asked for"),
        ("0f20c3", {}, "never exits"),  # MOV from CR0
        ("0f20e3", {}, "never exits"),
        ("0f22d3", {}, "never exits"),  # MOV to CR2
        ("0f22cb", {}, "CR1 is #UD"),
        ("440f22cb", {}, "CR9 is #UD"),
        ("0f22c3", {"rbx": 0x80010033 | 8}, "no bit changes"),  # TS is the guest's
        ("0f01f3", {"rbx": 0x33}, "no bit changes"),
        ("0f22c3", {"cpl": 3}, "CPL > 0"),
        ("f00f22c3", {}, "LOCK"),
        ("0f0133", {"rbx": 1 << 63}, "refused by its segment"),
    ],
)
def test_control_register_accesses_that_do_not_exit(code: str, state: dict[str, Any], why: str) -> None:
    with pytest.raises(NoExitError, match=why):
        exit_of("prot64", code, **state)


# -- debug registers (Table 28-4) ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "qualification"),
    [
        ("0f23c3", 0 | 3 << 8),  # MOV DR0, RBX
        ("0f23fb", 7 | 3 << 8),
        ("0f21fb", 7 | 1 << 4 | 3 << 8),  # MOV RBX, DR7
        ("410f21f7", 6 | 1 << 4 | 15 << 8),  # MOV R15, DR6
        ("0f23e3", 4 | 3 << 8),  # DR4, which the handler deals with
    ],
)
@pytest.mark.parametrize("cpl", [0, 3])
def test_debug_register_accesses(code: str, qualification: int, cpl: int) -> None:
    """They exit ahead of the privilege check."""
    assert fields(exit_of("prot64", code, cpl=cpl)) == (29, qualification, len(code) // 2)


def test_debug_registers_that_the_guest_owns_do_not_exit() -> None:
    vm = Exited("prot64", "0f23c3")
    vm.exit(er.EXIT_REASON_EPT_VIOLATION, 0x187, guest_physical_address=0x6000)
    vm.vcpu.vmcs.clear_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_MOV_DR_EXITING)
    with pytest.raises(NoExitError, match="not asked for"):
        instruction_exit(vm.machine)
    with pytest.raises(NoExitError, match="DR8"):
        exit_of("prot64", "440f23c3")


# -- port I/O (Table 28-5) -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "qualification"),
    [
        ("e460", 0x60 << 16 | 1 << 6 | 1 << 3 | 0),  # IN AL, 60h
        ("66e560", 0x60 << 16 | 1 << 6 | 1 << 3 | 1),
        ("e560", 0x60 << 16 | 1 << 6 | 1 << 3 | 3),
        ("e660", 0x60 << 16 | 1 << 6 | 0),  # OUT 60h, AL
        ("ec", 0x1234 << 16 | 1 << 3 | 0),  # IN AL, DX
        ("ef", 0x1234 << 16 | 3),  # OUT DX, EAX
        ("6c", 0x1234 << 16 | 1 << 4 | 1 << 3 | 0),  # INSB
        ("6f", 0x1234 << 16 | 1 << 4 | 3),  # OUTSD
        ("f36c", 0x1234 << 16 | 1 << 5 | 1 << 4 | 1 << 3 | 0),
        ("f3666f", 0x1234 << 16 | 1 << 5 | 1 << 4 | 1),
    ],
)
def test_port_accesses(code: str, qualification: int) -> None:
    state = {"rdx": 0x51234, "rsi": 0x8000, "rdi": 0x9000, "rcx": 2}
    assert fields(exit_of("prot64", code, **state)) == (30, qualification, len(code) // 2)


@pytest.mark.parametrize(("code", "state"), [("f36c", {"rcx": 0}), ("ec", {"cpl": 3}), ("90", {})])
def test_what_does_not_come_to_a_port(code: str, state: dict[str, Any]) -> None:
    with pytest.raises(NoExitError, match="does not exit"):
        exit_of("prot64", code, rdx=0x60, rdi=0x8000, **state)
    with pytest.raises(NoExitError, match="does not exit"):
        port_exit(Exited().machine, Probe(None, 1))


# -- everything else -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "reason", "state"),
    [
        ("0fa2", er.EXIT_REASON_CPUID, {"cpl": 3}),
        ("f4", er.EXIT_REASON_HLT, {}),
        ("0f08", er.EXIT_REASON_INVD, {}),
        ("0f33", er.EXIT_REASON_RDPMC, {}),
        ("0f33", er.EXIT_REASON_RDPMC, {"cpl": 3, "cr4": 0x720}),
        ("0f32", er.EXIT_REASON_MSR_READ, {}),
        ("0f30", er.EXIT_REASON_MSR_WRITE, {}),
        ("0f01c1", er.EXIT_REASON_VMCALL, {"cpl": 3}),
        ("0f01d1", er.EXIT_REASON_XSETBV, {"cr4": OSXSAVE}),
        ("0f01c8", er.EXIT_REASON_MONITOR_INSTRUCTION, {}),
        ("0f01c9", er.EXIT_REASON_MWAIT_INSTRUCTION, {}),
        ("f390", er.EXIT_REASON_PAUSE_INSTRUCTION, {}),
        ("0fc7f0", er.EXIT_REASON_RDRAND, {}),
        ("0fc7f8", er.EXIT_REASON_RDSEED, {}),
        ("0f09", er.EXIT_REASON_WBINVD, {}),
    ],
)
def test_instructions_by_opcode(code: str, reason: int, state: dict[str, Any]) -> None:
    assert fields(exit_of("prot64", code, **state)) == (reason, 0, len(code) // 2)


@pytest.mark.parametrize(
    ("mode", "code", "state", "address"),
    [
        ("prot64", "0f0138", {"rax": 0xFFFF800000001234}, 0xFFFF800000001234),
        ("prot64", "0f0138", {"rax": 1 << 63}, 1 << 63),  # not canonical
        ("prot64", "640f0138", {"rax": 0x1234}, 0x11234),  # FS
        ("prot32", "0f0138", {"rax": 0xFFFFFFFF}, 0xFFFFFFFF),
        ("prot32", "640f0138", {"rax": 0xFFFFF000}, 0xF000),
    ],
)
def test_invlpg_reports_a_linear_address(mode: str, code: str, state: dict[str, Any], address: int) -> None:
    fs = msgspec.structs.replace(segment_data(0x28, bits=32, dpl=0), base=0x10000)
    vm = Exited(mode, code, fs=fs, **state)
    vm.exit(er.EXIT_REASON_EPT_VIOLATION, 0x187, guest_physical_address=0x6000)
    with pytest.raises(NoExitError, match="not asked for"):
        instruction_exit(vm.machine)
    vm.vcpu.vmcs.set_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_INVLPG_EXITING)  # as without EPT
    assert fields(instruction_exit(vm.machine)) == (er.EXIT_REASON_INVLPG, address, len(code) // 2)


@pytest.mark.parametrize(
    ("code", "state", "why"),
    [
        ("0f33", {"cpl": 3}, "CR4.PCE"),
        ("0f01d1", {}, "CR4.OSXSAVE"),
        ("f4", {"cpl": 1}, "CPL > 0"),
        ("0f32", {"cpl": 3}, "CPL > 0"),
        ("f390", {"cpl": 3}, "CPL 0 only"),
        ("f00fa2", {}, "LOCK"),
        ("660f388200", {"rax": 0x8000}, "does not exit"),  # INVPCID, which only kvm.exit_reason can tell
        ("90", {}, "does not exit"),
        ("f4", {"knobs": {"hlt_in_guest": True}}, "not asked for"),
        ("0f01c9", {"knobs": {"mwait_in_guest": True}}, "not asked for"),
    ],
)
def test_instructions_that_do_not_exit(code: str, state: dict[str, Any], why: str) -> None:
    with pytest.raises(NoExitError, match=why):
        exit_of("prot64", code, **state)


@pytest.mark.parametrize(("flags", "state", "stopped"), [(0, 0, True), (1 << 16, 0, False), (0, 2, False)])
def test_a_breakpoint_ranks_above_the_exit(flags: int, state: int, stopped: bool) -> None:
    """Unless RF or MOV SS holds it back."""
    dr = (0x6000, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x401)
    vm = Exited("prot64", "0fa2", flags=flags, dr=dr, kvm={"interruptibility": state})
    vm.exit(er.EXIT_REASON_EPT_VIOLATION, 0x187, guest_physical_address=0x6000, interruptibility=state)
    if stopped:
        with pytest.raises(NoExitError, match="breakpoint"):
            instruction_exit(vm.machine)
    else:
        assert instruction_exit(vm.machine).reason == er.EXIT_REASON_CPUID


def test_a_state_that_cannot_be_entered_has_no_exits() -> None:
    big = msgspec.structs.replace(build_segments("real", 0)["ds"], limit=0xFFFFFFFF, g=1)
    with pytest.raises(NoExitError, match="cannot enter"):
        instruction_exit(Exited("real", "0fa2", ds=big, knobs={"unrestricted_guest": False}).machine)
