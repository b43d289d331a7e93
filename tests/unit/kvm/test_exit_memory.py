"""Exits 44, 46, 47, 48, 49: the accesses that end in the emulator."""

from __future__ import annotations

from typing import Any

import pytest
from support.exits import UD, Exited, event

from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault
from emufuzz.kvm.mmu.tdp import ept_violation_error_code
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.vmx_bits import GUEST_INTR_STATE_NMI, INTR_TYPE_EXT_INTR

HOLE = 0xB000
DEVICE = [{"kind": "mmio", "addr": hex(HOLE), "size": 4096, "behaviour": "ram", "reads": "0102"}]
READ, WRITE, FETCH = 1, 2, 4
TRANSLATED = 0x180  # the linear address is valid, and this is its translation
UNBLOCKED = 1 << 12
APIC = {"irqchip": True, "enable_apicv": True}
#: MOV EAX, [RAX].
LOAD = {"code": "8b00", "rax": HOLE}


# -- EPT violation ---------------------------------------------------------------------------------


def test_memory_is_mapped_and_the_guest_tries_again() -> None:
    vm = Exited(code="8b00", rax=0x8000)
    assert vm.exit(er.EXIT_REASON_EPT_VIOLATION, READ | TRANSLATED, guest_physical_address=0x8000) == 1
    assert (vm.machine.emulations, vm.rip) == (0, 0x6000)
    assert 8 in vm.machine.mmu.direct_map


def test_a_hole_is_emulated_as_a_device() -> None:
    vm = Exited(devices=DEVICE, **LOAD)
    vm.vcpu.trace = Trace()
    assert vm.exit(er.EXIT_REASON_EPT_VIOLATION, READ | TRANSLATED, guest_physical_address=HOLE) == 0
    assert (vm.run.exit_reason, vm.run.data["phys_addr"], vm.run.data["len"]) == ("MMIO", HOLE, 4)
    fault = next(item for item in vm.vcpu.trace.events if item.name == "kvm_page_fault")
    assert fault.fields == {"guest_rip": 0x6000, "fault_address": HOLE, "error_code": READ | TRANSLATED}


def test_a_write_to_a_read_only_slot_is_userspaces() -> None:
    slots = [{"base": "0x0", "size": 0x8000}, {"base": "0x8000", "size": 4096, "flags": 2}]
    numbers = [{name: int(str(value), 0) for name, value in slot.items()} for slot in slots]
    vm = Exited(code="8900", rax=0x8000, kvm={"memslots": numbers})
    violation = er.EXIT_REASON_EPT_VIOLATION
    assert vm.exit(violation, WRITE | TRANSLATED, guest_physical_address=0x8000) == 0
    assert (vm.run.exit_reason, vm.run.data["is_write"]) == ("MMIO", True)
    assert vm.machine.memory.spaces[0].read_guest(0x8000, 4) == bytes(4)
    assert vm.exit(violation, READ | TRANSLATED, guest_physical_address=0x8000) == 1  # reading is fine


@pytest.mark.parametrize(
    ("gpa", "smaller", "emulated"), [(1 << 40, True, 1), (1 << 40, False, 1), (0x8000, True, 0)]
)
def test_an_address_beyond_the_guests_processor(gpa: int, smaller: bool, emulated: int) -> None:
    """With the knob the emulator finds the fault in the guest's tables; without it is a device."""
    knobs = {"allow_smaller_maxphyaddr": smaller}
    vm = Exited(code="8b00", rax=0x8000, knobs=knobs, kvm={"cpuid": {"maxphyaddr": 36}})
    result = vm.exit(er.EXIT_REASON_EPT_VIOLATION, READ | TRANSLATED, guest_physical_address=gpa)
    assert vm.machine.emulations == emulated
    # the emulator reads the operand at its own address, unless it takes the exit's
    assert (result, vm.rip) == (
        (1, 0x6002) if smaller and emulated else (1, 0x6000) if not emulated else (0, 0x6000)
    )


@pytest.mark.parametrize("reason", [er.EXIT_REASON_EPT_VIOLATION, er.EXIT_REASON_PML_FULL])
@pytest.mark.parametrize(
    ("qualification", "vectoring", "vnmi", "blocked"),
    [
        (UNBLOCKED, 0, True, True),
        (0, 0, True, False),
        (UNBLOCKED, event(INTR_TYPE_EXT_INTR, 0x20), True, False),
        (UNBLOCKED, 0, False, False),
    ],
)
def test_iret_that_exits_blocks_nmis_again(
    reason: int, qualification: int, vectoring: int, vnmi: bool, blocked: bool
) -> None:
    vm = Exited(code="cf", knobs={"vnmi": vnmi})
    qualification |= READ | TRANSLATED
    assert vm.exit(reason, qualification, vectoring_info=vectoring, guest_physical_address=0xC000) == 1
    assert bool(vm.interruptibility & GUEST_INTR_STATE_NMI) is blocked


# -- EPT misconfiguration --------------------------------------------------------------------------


def test_a_known_hole_is_emulated_without_a_page_fault() -> None:
    vm = Exited(devices=DEVICE, **LOAD)
    vm.exit(er.EXIT_REASON_EPT_VIOLATION, READ | TRANSLATED, guest_physical_address=HOLE)
    assert vm.exit(er.EXIT_REASON_EPT_MISCONFIG, guest_physical_address=HOLE) == 0
    assert (vm.run.exit_reason, vm.machine.emulations) == ("MMIO", 2)


@pytest.mark.parametrize(
    ("fd", "kvm", "fast"),
    [
        ({"addr": HOLE}, {}, True),
        ({"addr": HOLE, "len": 0}, {}, True),
        ({"addr": HOLE, "len": 4}, {}, False),  # not on the fast bus
        ({"addr": HOLE + 4}, {}, False),
        ({"addr": HOLE, "port": True}, {}, False),
        ({"addr": HOLE}, {"guest_mode": True}, False),  # the address is L1's
    ],
)
def test_an_eventfd_takes_a_write_without_the_emulator(fd: Any, kvm: Any, fast: bool) -> None:
    vm = Exited(code="8900", rax=HOLE, kvm={"ioeventfds": [fd], **kvm})
    vm.vcpu.trace = Trace()
    kvm_mmu_page_fault(vm.machine.mmu, HOLE, ept_violation_error_code(WRITE | TRANSLATED))  # is known now
    vm.exit(er.EXIT_REASON_EPT_MISCONFIG, length=2, guest_physical_address=HOLE)
    assert (vm.machine.fast_mmio, vm.machine.emulations) == ((1, 0) if fast else (0, 1))
    traced = [item.fields for item in vm.vcpu.trace.events if item.name == "kvm_fast_mmio"]
    assert traced == ([{"gpa": HOLE}] if fast else [])
    if fast:
        assert vm.rip == 0x6002


def test_under_a_hypervisor_the_length_is_found_by_decoding() -> None:
    vm = Exited(code="8900", rax=HOLE, knobs={"host_hypervisor": True}, kvm={"ioeventfds": [{"addr": HOLE}]})
    assert vm.exit(er.EXIT_REASON_EPT_MISCONFIG, length=0, guest_physical_address=HOLE) == 1
    assert (vm.rip, vm.machine.fast_mmio, vm.machine.emulations) == (0x6002, 1, 1)


def test_a_misconfiguration_in_an_enclave_is_ud() -> None:
    vm = Exited(kvm={"ioeventfds": [{"addr": HOLE}]})
    reason = er.VMX_EXIT_REASONS_ENCLAVE_MODE | er.EXIT_REASON_EPT_MISCONFIG
    assert vm.exit(er.EXIT_REASON_EPT_MISCONFIG, full_reason=reason, guest_physical_address=HOLE) == 1
    assert (vm.pending, vm.machine.fast_mmio) == (UD, 0)


# -- the APIC page ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "qualification", "shortcut"),
    [
        (APIC, 0x10B0, True),
        (APIC | {"fasteoi": False}, 0x10B0, False),
        (APIC, 0x00B0, False),  # a read
        (APIC, 0x10A0, False),  # another register
        (APIC, 0x30B0, False),  # the delivery of an event
        ({}, 0x10B0, False),  # without an APIC of the kernel's
    ],
)
def test_eoi_needs_no_emulator(knobs: Any, qualification: int, shortcut: bool) -> None:
    lapic = {0xF0: 0x1FF, 0x110: 2} if "irqchip" in knobs else {}  # vector 33 is in service
    vm = Exited(code="8900", rax=0x8000, knobs=knobs, kvm={"lapic": lapic})
    assert vm.exit(er.EXIT_REASON_APIC_ACCESS, qualification, length=2) == 1
    assert vm.machine.emulations == (not shortcut)
    assert vm.rip == 0x6002
    if shortcut:
        assert vm.vcpu.apic is not None
        assert vm.vcpu.apic.regs[0x110:0x114] == bytes(4)


def test_any_other_access_is_emulated_and_reaches_the_apic() -> None:
    vm = Exited(code="8b00", rax=0xFEE00030, knobs=APIC)
    assert vm.exit(er.EXIT_REASON_APIC_ACCESS, 0x0030, length=2) == 1
    assert (vm.reg("rax") & 0xFF, vm.rip, vm.run.exit_reason) == (0x14, 0x6002, "UNKNOWN")


# -- descriptor tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reason", "code", "cpl", "pending"),
    [
        (er.EXIT_REASON_GDTR_IDTR, "0f0100", 0, None),  # SGDT [RAX]
        (er.EXIT_REASON_GDTR_IDTR, "0f0108", 0, None),  # SIDT
        (er.EXIT_REASON_LDTR_TR, "0f0000", 0, None),  # SLDT
        (er.EXIT_REASON_LDTR_TR, "0f00c8", 0, None),  # STR EAX
        (er.EXIT_REASON_GDTR_IDTR, "0f0100", 3, (13, 0, None)),  # what UMIP is for
        (er.EXIT_REASON_LDTR_TR, "0f00c8", 3, (13, 0, None)),
    ],
)
def test_accesses_to_descriptor_tables_are_emulated(reason: int, code: str, cpl: int, pending: Any) -> None:
    vm = Exited(code=code, rax=0x8000, cpl=cpl, cr4=0x620 | 1 << 11, knobs={"host_umip": False})
    assert vm.exit(reason, length=3) == 1
    assert (vm.pending, vm.machine.emulations) == (pending, 1)
    assert vm.rip == (0x6000 if pending else 0x6003)
