"""Exits of instructions that their handlers carry out, and of port I/O."""

from __future__ import annotations

from typing import Any

import pytest
from support.exits import GP, UD, Exited

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.vcpu import MP_STATE_HALTED, MP_STATE_RUNNABLE

TF = 0x100
IRQCHIP = {"irqchip": True}
VMX_INSTRUCTIONS = (
    er.EXIT_REASON_VMCLEAR, er.EXIT_REASON_VMLAUNCH, er.EXIT_REASON_VMPTRLD, er.EXIT_REASON_VMPTRST,
    er.EXIT_REASON_VMREAD, er.EXIT_REASON_VMRESUME, er.EXIT_REASON_VMWRITE, er.EXIT_REASON_VMOFF,
    er.EXIT_REASON_VMON, er.EXIT_REASON_INVEPT, er.EXIT_REASON_INVVPID, er.EXIT_REASON_VMFUNC,
)  # fmt: skip
INVALID = (er.EXIT_REASON_RDRAND, er.EXIT_REASON_RDSEED, er.EXIT_REASON_ENCLS)
NOPS = (
    er.EXIT_REASON_INVD, er.EXIT_REASON_WBINVD, er.EXIT_REASON_PAUSE_INSTRUCTION,
    er.EXIT_REASON_MONITOR_INSTRUCTION, er.EXIT_REASON_MWAIT_INSTRUCTION,
)  # fmt: skip


@pytest.mark.parametrize("reason", [*VMX_INSTRUCTIONS, *INVALID])
def test_instructions_that_the_guest_does_not_have_are_ud(reason: int) -> None:
    vm = Exited()
    assert vm.exit(reason, length=3) == 1
    assert (vm.pending, vm.rip) == (UD, 0x6000)


@pytest.mark.parametrize("reason", NOPS)
def test_nops_are_skipped_with_their_shadow(reason: int) -> None:
    vm = Exited(kvm={"interruptibility": 1})
    assert vm.exit(reason, length=2, interruptibility=1) == 1
    assert (vm.pending, vm.rip, vm.interruptibility) == (None, 0x6002, 0)


@pytest.mark.parametrize("reason", [er.EXIT_REASON_MONITOR_INSTRUCTION, er.EXIT_REASON_MWAIT_INSTRUCTION])
@pytest.mark.parametrize(("feature", "pending"), [(True, None), (False, UD)])
def test_monitor_and_mwait_without_the_quirk_need_the_feature(
    reason: int, feature: bool, pending: Any
) -> None:
    knobs = {"disabled_quirks": "mwait_never_ud_faults"}
    vm = Exited(knobs=knobs, kvm={"cpuid": {"features": {"mwait": feature}}})
    assert vm.exit(reason, length=3) == 1
    assert (vm.pending, vm.rip) == (pending, 0x6000 if pending else 0x6003)


# -- skipping --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "rip", "length", "after"),
    [
        ("prot64", 0x6000, 2, 0x6002),
        ("prot64", 0x6000, 0, 0x6000),
        ("prot64", 0xFFFFFFFF, 2, 0x100000001),
        ("prot32", 0xFFFFFFFF, 2, 1),
        ("prot32", 0x7FFFFFFF, 2, 0x80000001),
    ],
)
def test_rip_moves_by_the_length_of_the_exit(mode: str, rip: int, length: int, after: int) -> None:
    vm = Exited(mode, "90", rip=rip, mem=None)
    assert vm.exit(er.EXIT_REASON_INVD, length=length) == 1
    assert vm.rip == after


def test_single_step_after_a_skip() -> None:
    vm = Exited(flags=TF)
    assert vm.exit(er.EXIT_REASON_INVD, length=2) == 1
    assert vm.pending is not None
    assert (vm.pending[0], vm.vcpu.exception.payload, vm.rip) == (1, 0x4000, 0x6002)


def test_single_step_of_userspace_after_a_skip() -> None:
    vm = Exited(kvm={"guest_debug": 3})
    assert vm.exit(er.EXIT_REASON_INVD, length=2) == 0
    assert (vm.run.exit_reason, vm.run.data["pc"], vm.rip) == ("DEBUG", 0x6002, 0x6002)


# -- CPUID, RDPMC, INVLPG --------------------------------------------------------------------------


def test_cpuid_loads_four_registers_and_is_traced() -> None:
    vm = Exited(code="0fa2", rax=0xAAAAAAAA00000000, rcx=0x1234567800000000)
    vm.vcpu.trace = Trace()
    assert vm.exit(er.EXIT_REASON_CPUID, length=2) == 1
    names = b"".join(vm.reg(name).to_bytes(8, "little")[:4] for name in ("rbx", "rdx", "rcx"))
    assert names == b"GenuineIntel"
    assert vm.rip == 0x6002
    assert [vm.reg(name) >> 32 for name in ("rax", "rbx", "rcx", "rdx")] == [0] * 4
    [traced] = vm.vcpu.trace.events
    assert (traced.name, traced.fields["function"], traced.fields["found"]) == ("kvm_cpuid", 0, True)


@pytest.mark.parametrize(("fault", "cpl", "pending"), [(1, 3, GP), (1, 0, None), (0, 3, None)])
def test_cpuid_faulting(fault: int, cpl: int, pending: Any) -> None:
    vm = Exited(code="0fa2", cpl=cpl)
    vm.vcpu.msrs[0x140] = fault
    assert vm.exit(er.EXIT_REASON_CPUID, length=2) == 1
    assert (vm.pending, vm.rip) == (pending, 0x6000 if pending else 0x6002)


def test_rdpmc_without_a_pmu_is_gp() -> None:
    vm = Exited(code="0f33")
    assert vm.exit(er.EXIT_REASON_RDPMC, length=2) == 1
    assert (vm.pending, vm.rip) == (GP, 0x6000)


def test_rdpmc_reads_into_edx_and_eax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emufuzz.kvm.exit_instruction.kvm_pmu_rdpmc", lambda _vcpu, idx: (0, idx << 32 | 5))
    vm = Exited(code="0f33", rcx=0xF00000003, rax=1 << 40, rdx=1 << 40)
    assert vm.exit(er.EXIT_REASON_RDPMC, length=2) == 1
    assert (vm.reg("rax"), vm.reg("rdx"), vm.rip) == (5, 3, 0x6002)


def test_invlpg_drops_the_address_of_the_qualification(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(KvmMmu, "invlpg", lambda _mmu, address: seen.append(address))
    vm = Exited(code="0f0138")
    assert vm.exit(er.EXIT_REASON_INVLPG, 0xFFFF800000001234, length=3) == 1
    assert (seen, vm.rip) == ([0xFFFF800000001234], 0x6003)


# -- HLT -------------------------------------------------------------------------------------------


def test_hlt_without_an_apic_leaves_for_userspace() -> None:
    vm = Exited(code="f4")
    assert vm.exit(er.EXIT_REASON_HLT, length=1) == 0
    assert (vm.run.exit_reason, vm.rip, vm.vcpu.mp_state) == ("HLT", 0x6001, MP_STATE_RUNNABLE)


def test_hlt_with_an_apic_sleeps() -> None:
    vm = Exited(code="f4", knobs=IRQCHIP)
    assert vm.exit(er.EXIT_REASON_HLT, length=1) == 1
    assert (vm.rip, vm.vcpu.mp_state) == (0x6001, MP_STATE_HALTED)


def test_hlt_does_not_sleep_over_an_event() -> None:
    vm = Exited(code="f4", knobs=IRQCHIP, flags=TF)  # the #DB of single step
    assert vm.exit(er.EXIT_REASON_HLT, length=1) == 1
    assert vm.vcpu.mp_state == MP_STATE_RUNNABLE


def test_hlt_hides_that_userspace_steps() -> None:
    vm = Exited(code="f4", kvm={"guest_debug": 3})
    assert vm.exit(er.EXIT_REASON_HLT, length=1) == 0
    assert vm.run.exit_reason == "HLT"
    vm = Exited(code="f4", knobs=IRQCHIP, kvm={"guest_debug": 3})
    assert vm.exit(er.EXIT_REASON_HLT, length=1) == 0
    assert (vm.run.exit_reason, vm.vcpu.mp_state) == ("DEBUG", MP_STATE_HALTED)


# -- VMCALL ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpl", "rax", "result"), [(0, 1, 0), (0, 99, -1000), (3, 1, -1)])
def test_vmcall_is_a_hypercall(cpl: int, rax: int, result: int) -> None:
    vm = Exited(code="0f01c1", cpl=cpl, rax=rax)
    assert vm.exit(er.EXIT_REASON_VMCALL, length=3) == 1
    assert (vm.reg("rax"), vm.rip) == (result & (1 << 64) - 1, 0x6003)


# -- port I/O --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "before", "answer", "after"),
    [
        (1, 0x1111111111111111, b"\xab", 0x11111111111111AB),
        (2, 0x1111111111111111, b"\xab\xcd", 0x111111111111CDAB),
        (4, 0x1111111111111111, b"\xab\xcd\xef\x01", 0x01EFCDAB),
    ],
)
def test_in_takes_what_userspace_answers(size: int, before: int, answer: bytes, after: int) -> None:
    vm = Exited(code="ed", rax=before)
    assert vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 0x60 << 16 | 1 << 3 | size - 1, length=1) == 0
    data = vm.run.data
    assert (vm.run.exit_reason, data["direction"], data["size"], data["port"], data["count"]) == (
        "IO", "in", size, 0x60, 1,
    )  # fmt: skip
    assert (vm.rip, vm.machine.emulations) == (0x6000, 0)
    vm.machine.pio.data = answer
    completion = vm.vcpu.complete_userspace_io
    assert completion is not None
    assert completion(vm.vcpu) == 1
    assert (vm.reg("rax"), vm.rip, vm.machine.pio.count) == (after, 0x6001, 0)


@pytest.mark.parametrize("direction", [0, 1 << 3])
def test_an_instruction_that_userspace_has_moved_on_is_not_skipped_again(direction: int) -> None:
    vm = Exited(code="ed", rax=0x55)
    vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 0x60 << 16 | direction, length=1)
    vm.vcpu.regs[16] = 0x7000
    vm.machine.pio.data = b"\xff"
    completion = vm.vcpu.complete_userspace_io
    assert completion is not None
    assert completion(vm.vcpu) == 1
    assert (vm.rip, vm.reg("rax"), vm.machine.pio.count) == (0x7000, 0x55, 0)


def test_out_is_told_to_userspace_and_then_skipped() -> None:
    vm = Exited(code="ef", rax=0x1122334455667788)
    assert vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 0x60 << 16 | 3, length=1) == 0
    assert (vm.run.data["direction"], vm.run.data["data"]) == ("out", bytes.fromhex("88776655"))
    completion = vm.vcpu.complete_userspace_io
    assert completion is not None
    assert (vm.rip, completion(vm.vcpu), vm.rip) == (0x6000, 1, 0x6001)


@pytest.mark.parametrize(("disabled", "moved"), [("", True), ("out_7e_inc_rip", False)])
def test_port_7e_moves_rip_first(disabled: str, moved: bool) -> None:
    vm = Exited(code="e67e", knobs={"disabled_quirks": disabled})
    assert vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 0x7E << 16 | 1 << 6, length=2) == 0
    assert vm.rip == (0x6002 if moved else 0x6000)
    completion = vm.vcpu.complete_userspace_io
    assert completion is not None
    assert (completion(vm.vcpu), vm.rip, vm.machine.pio.count) == (1, 0x6002, 0)


def test_an_eventfd_takes_an_out() -> None:
    vm = Exited(
        code="e660", rax=7, kvm={"ioeventfds": [{"addr": 0x60, "len": 1, "port": True, "datamatch": 7}]}
    )
    assert vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 0x60 << 16, length=2) == 1
    assert (vm.rip, vm.run.exit_reason) == (0x6002, "UNKNOWN")


@pytest.mark.parametrize(("code", "direction"), [("6c", "in"), ("6e", "out")])
def test_string_io_is_emulated(code: str, direction: str) -> None:
    vm = Exited(code=code, rdx=0x60, rsi=0x8000, rdi=0x8000)
    assert vm.exit(er.EXIT_REASON_IO_INSTRUCTION, 0x60 << 16 | 1 << 4, length=1) == 0
    assert (vm.machine.emulations, vm.run.data["direction"]) == (1, direction)
