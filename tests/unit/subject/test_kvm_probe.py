"""The dry run that finds the exit of an access: nothing changes, and the first exit ends it."""

from __future__ import annotations

from typing import Any

import pytest
from support.exits import Exited

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault
from emufuzz.kvm.mmu.tdp import ept_violation_error_code
from emufuzz.kvm.regs import kvm_rip_write
from emufuzz.subject.kvm.probe import (
    MemoryExit,
    NativeFaultError,
    PortExit,
    Probe,
    StoppedError,
    decode_at_rip,
    probe,
)

HOLE = 0xB000
DEVICE = [{"kind": "mmio", "addr": hex(HOLE), "size": 4096}]
SHADOW = {"ept": False, "host_maxphyaddr": 46, "unrestricted_guest": False}
APIC = {"irqchip": True, "enable_apicv": True}
READ, WRITE, FETCH, TABLE, FINAL = 1, 2, 4, 0x80, 0x180
PAGES = (6, 7, 8, 9, 0xA, 0xC)


def mapped(mode: str, code: str, **kwargs: Any) -> Exited:
    """A guest whose memory KVM has mapped, page tables included."""
    vm = Exited(mode, code, **kwargs)
    pages = vm.machine.memory.spaces[0]
    for gfn in (*PAGES, *range(0x100, 0x108)):
        if pages.gfn_to_memslot(gfn) is not None:
            vm.exit(er.EXIT_REASON_EPT_VIOLATION, READ | FINAL, guest_physical_address=gfn << 12)
    assert vm.machine.emulations == 0
    return vm


def found(vm: Exited) -> Probe:
    """What the probe finds, with the proof that it leaves everything as it was."""

    def state() -> tuple[Any, ...]:
        fpu = vm.machine.ctxt.fpu
        return (
            vm.vcpu.regs[:], vm.vcpu.vmcs.values.copy(), vm.vcpu.requests.copy(), vm.pending,
            vm.machine.memory.changed_pages(), list(fpu.xmm), fpu.fcw, vm.machine.emulations, vm.vcpu.cr0,
        )  # fmt: skip

    vm.flags, vm.rip  # noqa: B018 - the register cache fills now
    vm.reg("rsp")
    before = state()
    result = probe(vm.machine)
    assert state() == before
    return result


def test_memory_that_is_mapped_has_no_exit() -> None:
    assert found(mapped("prot64", "488b00", rax=0x8000)) == Probe(None, 3)


@pytest.mark.parametrize(
    ("code", "gva", "qualification"),
    [
        ("8b00", HOLE + 4, READ | FINAL),
        ("8900", HOLE + 4, WRITE | FINAL),
        ("ff00", HOLE + 4, READ | FINAL),  # INC reads first
        ("8b00", 0xAFFE, READ | FINAL),  # the second page of the operand
        ("0fb700", HOLE, READ | FINAL),
        ("0f1000", HOLE, READ | FINAL),  # MOVUPS
        ("f00fb108", HOLE, READ | FINAL),  # LOCK CMPXCHG
        ("0f0110", HOLE, READ | FINAL),  # LGDT reads a system structure
        ("0f0100", HOLE, WRITE | FINAL),  # SGDT
        ("0fc700", HOLE, READ | FINAL),  # no instruction, taken to read its operand
    ],
)
def test_a_hole_is_a_violation_of_the_access(code: str, gva: int, qualification: int) -> None:
    cause = found(mapped("prot64", code, rax=gva, devices=DEVICE)).cause
    assert isinstance(cause, MemoryExit)
    gpa = max(gva, HOLE)
    assert (cause.reason, cause.qualification, cause.gpa) == (
        er.EXIT_REASON_EPT_VIOLATION,
        qualification,
        gpa,
    )


def test_a_hole_that_kvm_knows_is_a_misconfiguration() -> None:
    vm = mapped("prot64", "8b00", rax=HOLE, devices=DEVICE)
    kvm_mmu_page_fault(vm.machine.mmu, HOLE, ept_violation_error_code(READ | FINAL))
    assert found(vm) == Probe(MemoryExit(er.EXIT_REASON_EPT_MISCONFIG, 0, HOLE), 2)


@pytest.mark.parametrize(("code", "exits"), [("8b00", False), ("8900", True), ("ff00", True)])
def test_a_read_only_slot_exits_for_writes(code: str, exits: bool) -> None:
    slots = [{"base": 0, "size": 0x8000}, {"base": 0x8000, "size": 0x1000, "flags": 2}]
    cause = found(mapped("prot64", code, rax=0x8000, kvm={"memslots": slots})).cause
    if exits:
        assert isinstance(cause, MemoryExit)
        assert cause.qualification == WRITE | FINAL | 5 << 3  # it may be read and executed
    else:
        assert cause is None


def test_code_that_is_not_mapped_exits_before_it_is_known() -> None:
    vm = Exited("prot64", "90")
    assert found(vm) == Probe(MemoryExit(er.EXIT_REASON_EPT_VIOLATION, FETCH | FINAL, 0x6000), 0)


def test_code_that_goes_on_into_a_hole() -> None:
    vm = mapped("prot64", "8b", rip=0xAFFF, devices=DEVICE)
    assert found(vm).cause == MemoryExit(er.EXIT_REASON_EPT_VIOLATION, FETCH | FINAL, HOLE)


def test_an_absent_page_is_the_guests_own_fault() -> None:
    with pytest.raises(NativeFaultError, match="#PF at 0xb000"):
        found(mapped("prot64", "8b00", rax=HOLE))


def test_page_tables_that_are_not_mapped_exit_as_read_and_write() -> None:
    vm = Exited("prot64", "90", physical=True)
    cause = found(vm).cause
    assert isinstance(cause, MemoryExit)
    assert (cause.reason, cause.qualification) == (er.EXIT_REASON_EPT_VIOLATION, READ | WRITE | TABLE)
    assert cause.gpa & ~0xFFF == 0x100000


@pytest.mark.parametrize(
    ("code", "state", "cause"),
    [
        ("ec", {"rdx": 0x60}, PortExit(0x60, 1, 1, True)),
        ("66ef", {"rdx": 0x60}, PortExit(0x60, 2, 1, False)),
        ("f36c", {"rdx": 0x60, "rcx": 3, "rdi": 0x8000}, PortExit(0x60, 1, 3, True)),
        ("f36e", {"rdx": 0x60, "rcx": 3, "rsi": 0x8000}, PortExit(0x60, 1, 1, False)),
    ],
)
def test_ports(code: str, state: dict[str, int], cause: PortExit) -> None:
    assert found(mapped("prot64", code, **state)) == Probe(cause, len(code) // 2)


def test_outs_reads_its_memory_first() -> None:
    cause = found(mapped("prot64", "6e", rdx=0x60, rsi=HOLE, devices=DEVICE)).cause
    assert isinstance(cause, MemoryExit)


@pytest.mark.parametrize(
    ("code", "gva", "qualification"),
    [("8b00", 0xFEE00030, 0x030), ("8900", 0xFEE000B0, 0x10B0), ("8b00", 0xFEE00FFC, 0xFFC)],
)
def test_the_apic_page(code: str, gva: int, qualification: int) -> None:
    vm = mapped("prot64", code, rax=gva, knobs=APIC)
    assert found(vm).cause == MemoryExit(er.EXIT_REASON_APIC_ACCESS, qualification, gva)


def test_code_in_the_apic_page() -> None:
    vm = mapped("prot64", "90", knobs=APIC)
    kvm_rip_write(vm.vcpu, 0xFEE00010)
    assert probe(vm.machine) == Probe(MemoryExit(er.EXIT_REASON_APIC_ACCESS, 0x2010, 0xFEE00010), 0)


@pytest.mark.parametrize(("knobs", "exits"), [({"flexpriority": False}, False), ({}, True)])
def test_without_virtualisation_the_apic_page_is_as_any(knobs: dict[str, bool], exits: bool) -> None:
    apic = {"irqchip": True, "enable_apicv": True}
    vm = mapped("prot64", "8b00", rax=0xFEE00030, knobs={**apic, **knobs})
    cause = found(vm).cause
    assert isinstance(cause, MemoryExit)
    assert (cause.reason == er.EXIT_REASON_APIC_ACCESS) is exits


def test_without_a_local_apic_its_page_is_absent() -> None:
    vm = mapped("prot64", "8b00", rax=0xFEE00030, knobs={})
    with pytest.raises(NativeFaultError, match="0xfee00030"):
        found(vm)


# -- shadow paging ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "address", "error_code"),
    [("8b00", 0x8000, 0), ("8900", 0x8000, 2), ("8b00", HOLE, 0)],
)
def test_shadow_pages_that_are_missing_fault(code: str, address: int, error_code: int) -> None:
    vm = Exited("prot32", code, rax=address, knobs=SHADOW, physical=True)
    assert found(vm) == Probe(MemoryExit(0, 0x6000, 0, 0x10), 0)
    vm.exception(14, 0x10, 0x6000)
    assert found(vm) == Probe(MemoryExit(0, address, 0, error_code), 2)


def test_a_fault_of_the_guests_tables_reaches_kvm_first() -> None:
    """With shadow paging every #PF exits, the guest's own too."""
    vm = Exited("prot32", "8b00", rax=0xD000, knobs=SHADOW, physical=True)
    vm.exception(14, 0x10, 0x6000)
    assert found(vm).cause == MemoryExit(0, 0xD000, 0, 0)


@pytest.mark.parametrize("code", ["a100d0", "a300d0"])
def test_absent_pages_of_flat_memory_are_the_guests_own(code: str) -> None:
    """Without paging nothing but the hidden tables could fault; KVM hears of devices only."""
    vm = Exited("real", code, knobs=SHADOW)
    vm.exception(14, 0x10, 0x6000)
    with pytest.raises(NativeFaultError, match="0xd000"):
        probe(vm.machine)
    device = [{"kind": "mmio", "addr": "0xd000", "size": 4096}]
    there = Exited("real", code, knobs=SHADOW, devices=device)
    there.exception(14, 0x10, 0x6000)
    assert isinstance(probe(there.machine).cause, MemoryExit)


# -- decoding --------------------------------------------------------------------------------------


def test_decoding_has_a_context_of_its_own() -> None:
    vm = mapped("prot64", "0fa2")
    own = vm.machine.ctxt
    decoded = decode_at_rip(vm.machine)
    assert decoded is not own
    assert vm.machine.ctxt is own
    assert (decoded.b, decoded.opcode_len, decoded.fetch_pos) == (0xA2, 2, 2)


def test_decoding_stops_where_the_code_is_not_mapped() -> None:
    with pytest.raises(StoppedError) as stopped:
        decode_at_rip(Exited("prot64", "90").machine)
    assert stopped.value.cause == MemoryExit(er.EXIT_REASON_EPT_VIOLATION, FETCH | FINAL, 0x6000)


WITH_EFFECT = (
    "0f22c0", "0f23c0", "0f0110", "8ed8", "0f30", "0f32", "0f0138", "f4", "0f01d1", "0faa", "cf", "ca0000",
    "0f00d8", "fa", "fb", "0f06", "0f05", "0f34", "0fa2", "dbe3", "0f77", "0f57c0", "50", "58", "e8000000ff",
)  # fmt: skip


@pytest.mark.parametrize("code", WITH_EFFECT)
def test_whatever_the_instruction_does_nothing_changes(code: str) -> None:
    vm = mapped("prot64", code, rax=0x8000, rcx=0xC0000081)
    found(vm)
