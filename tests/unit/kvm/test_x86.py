"""x86_emulate_instruction, row by row, up to the emulator: the queue, breakpoints, decoding, skipping."""

from __future__ import annotations

import pytest
from support.machines import DB, GP, LOW_DEVICE, UD, built, emulate, enter, mmio

from emufuzz.emulator.x86emul import EMULATION_INTERCEPTED
from emufuzz.kvm import emultype as et
from emufuzz.kvm import x86
from emufuzz.kvm.exceptions import kvm_queue_exception_e
from emufuzz.kvm.vcpu import KVM_REQ_EVENT
from emufuzz.kvm.vmx_check import ENCLAVE_MODE

TF, RF = 1 << 8, 1 << 16
FAILS = "0f01f9"  # RDTSCP decodes and cannot be executed
UNKNOWN = "0f0b"


# -- steps 1 and 2: what may be emulated at all --------------------------------------------------


def test_an_enclave_cannot_be_emulated():
    vm = built()
    vm.vcpu.exit_reason |= ENCLAVE_MODE
    assert emulate(vm) == 1
    assert (vm.pending, vm.rip) == (UD, 0x6000)


@pytest.mark.parametrize("guest_mode", [None, True])
def test_retry_is_for_page_faults_of_l1(guest_mode):
    """ALLOW_RETRY_PF without PF, or for L2, counts for nothing: the failure is a failure."""
    vm = built(FAILS, kvm={"guest_mode": guest_mode} if guest_mode else None)
    bits = et.EMULTYPE_ALLOW_RETRY_PF | (et.EMULTYPE_PF if guest_mode else 0)
    emulate(vm, bits, 0x8000)
    assert vm.pending == UD


# -- step 3: the queue and breakpoints -----------------------------------------------------------


def test_emulation_clears_the_queue():
    """What was pending or being delivered is forgotten, even if the instruction then fails."""
    vm = built(UNKNOWN)
    kvm_queue_exception_e(vm.vcpu, 13, 0)
    vm.vcpu.exception.injected = True
    emulate(vm, et.EMULTYPE_TRAP_UD)
    assert vm.pending == UD
    assert not vm.vcpu.exception.injected


def test_a_fault_while_an_event_is_delivered_does_not_become_a_double_fault():
    """KVM deviation: #PF during the delivery of #GP is #DF (SDM Vol. 3A 6.15), but the queue was cleared."""
    vm = built("8b07", rdi=0xE000)
    vm.vcpu.exception.injected = True
    vm.vcpu.exception.vector = 13
    emulate(vm)
    assert vm.pending == (14, 0, 0xE000)


GP_BEING_DELIVERED = {"vectoring_info": 0x80000B0D, "vectoring_error_code": 0}


def test_an_event_whose_delivery_is_emulated_is_lost():
    """KVM deviation: what was being delivered is delivered again after the exit (SDM Vol. 3C 27.2.4).

    Emulation takes the access for one of the instruction at RIP, and has cleared the queue.
    """
    vm = enter("ept-violation", code="8b07", rdi=LOW_DEVICE, devices=[mmio()], kvm=GP_BEING_DELIVERED)
    assert (vm.exit.exit_reason, vm.vcpu.exception.injected, vm.pending) == ("MMIO", False, None)
    assert vm.run(data=bytes(4)).rip == 0x6002


def test_a_known_device_in_the_way_of_a_delivery_is_an_error():
    """The exit for a device's SPTE would come again for ever, so userspace is told."""
    vm = enter("ept-misconfig", code="8b07", rdi=LOW_DEVICE, devices=[mmio()], kvm=GP_BEING_DELIVERED)
    assert (vm.exit.exit_reason, vm.exit.data["suberror"]) == ("INTERNAL_ERROR", 3)
    assert (vm.machine.emulations, vm.vcpu.exception.injected) == (0, True)


def test_without_decoding_the_queue_stays_and_faults_are_merged():
    """A completion does not clear it: a contributory fault on top of another makes #DF."""
    vm = enter("ept-misconfig", code="f737", rdi=LOW_DEVICE, devices=[mmio()])
    kvm_queue_exception_e(vm.vcpu, 13, 0)
    vm.run(data=bytes(4))
    assert vm.pending == (8, 0, None)


def test_a_fault_on_top_of_a_double_fault_is_a_triple_fault():
    vm = enter("ept-misconfig", code="f737", rdi=LOW_DEVICE, devices=[mmio()])
    kvm_queue_exception_e(vm.vcpu, 8, 0)
    vm.run(data=bytes(4))
    assert vm.exit.exit_reason == "SHUTDOWN"


CODE_BREAKPOINT = (0x6000, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x401)


@pytest.mark.parametrize(
    ("bits", "stops"),
    [
        (0, True),
        (et.EMULTYPE_TRAP_UD_FORCED, True),
        (et.EMULTYPE_TRAP_UD, False),
        (et.EMULTYPE_SKIP, False),
        (et.EMULTYPE_PF, False),
        (et.EMULTYPE_VMWARE_GP, False),
    ],
)
def test_who_looks_for_breakpoints(bits, stops):
    vm = built("90", dr=CODE_BREAKPOINT)
    assert emulate(vm, bits) == 1
    assert (vm.pending == (DB, None, None)) is stops


def test_userspace_s_breakpoint_leaves():
    dr = [hex(0x6000), "0x0", "0x0", "0x0", "0x0", "0x0", "0x0", "0x401"]
    vm = built("90", kvm={"guest_debug": {"control": 1 | 1 << 17, "dr": dr}})
    assert emulate(vm) == 0
    assert (vm.exit.exit_reason, vm.exit.data["pc"], vm.exit.data["exception"]) == ("DEBUG", 0x6000, 1)
    assert (vm.exit.data["dr6"], vm.rip) == (0xFFFF0FF1, 0x6000)


# -- step 4: decoding fails ----------------------------------------------------------------------


@pytest.mark.parametrize("bits", [et.EMULTYPE_TRAP_UD, et.EMULTYPE_TRAP_UD_FORCED])
@pytest.mark.parametrize("cpl", [0, 3])
def test_where_ud_led_here_an_unknown_instruction_is_ud(bits, cpl):
    vm = built(UNKNOWN, cpl=cpl)
    assert emulate(vm, bits) == 1
    assert vm.pending == UD


def test_trap_ud_only_takes_what_kvm_lends():
    vm, lent = built("90"), built("0f01d9", cpl=0)  # NOP, and AMD's VMMCALL
    assert emulate(vm, et.EMULTYPE_TRAP_UD) == emulate(lent, et.EMULTYPE_TRAP_UD) == 1
    assert (vm.pending, vm.rip) == (UD, 0x6000)
    assert (lent.pending, lent.mem(0x6000, 3).hex()) == (None, "0f01c1")


def test_a_fault_of_the_fetch_is_injected():
    vm = built("8b", rip=0xAFFF)
    assert emulate(vm) == 1
    assert (vm.pending, vm.rip) == ((14, 0x10, 0xB000), 0xAFFF)


def test_a_fault_of_the_fetch_while_skipping_is_a_failure():
    vm = built("8b", rip=0xAFFF)
    assert emulate(vm, et.EMULTYPE_SKIP) == 0
    assert (vm.exit.exit_reason, vm.pending) == ("INTERNAL_ERROR", None)
    assert (vm.exit.data["insn_size"], vm.exit.data["insn_bytes"][:2]) == (1, b"\x8b\x90")


def test_code_without_memory_is_a_failure_without_bytes():
    """Nothing was fetched, so nothing is reported (flags are 0)."""
    vm = built("90", mode="prot32")
    vm.set_regs(rip=LOW_DEVICE)
    vm.machine.hidden.devices = frozenset({LOW_DEVICE >> 12})
    assert emulate(vm) == 0
    assert vm.exit.data["flags"] == 0
    assert "insn_bytes" not in vm.exit.data
    assert vm.pending == UD


# -- step 5: VMware's backdoor -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "taken"),
    [("ec", True), ("e460", True), ("6c", True), ("ee", True), ("e660", True), ("6e", True), ("0f33", True),
     ("90", False), ("0f32", False), ("8b07", False)],
)  # fmt: skip
def test_vmware_gp_takes_ports_and_rdpmc(monkeypatch, code, taken):
    """The backdoor is IN, OUT, INS, OUTS and RDPMC; all else is the guest's own #GP(0)."""
    ran = []
    monkeypatch.setattr(x86, "x86_emulate_insn", lambda *_: ran.append(code) or EMULATION_INTERCEPTED)
    vm = built(code)
    assert emulate(vm, et.EMULTYPE_VMWARE_GP) == 1
    assert bool(ran) is taken
    assert vm.pending == (None if taken else GP)


def test_vmware_gp_that_cannot_be_decoded_is_gp():
    vm = built(UNKNOWN)
    assert emulate(vm, et.EMULTYPE_VMWARE_GP) == 1
    assert vm.pending == GP


# -- step 6: skipping ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "code", "rip", "after"),
    [("prot64", "488b0425" + "00" * 4, 0x6000, 0x6008), ("prot32", "8b07", 0x6000, 0x6002)],
)
def test_skip_moves_rip_and_nothing_else(mode, code, rip, after):
    vm = built(code, mode, rip=rip, flags=RF | TF, rdi=LOW_DEVICE)
    assert emulate(vm, et.EMULTYPE_SKIP) == 1
    assert (vm.rip, vm.flags, vm.pending) == (after, TF | 2, None)
    assert vm.machine.retired == 0


def test_skip_cuts_rip_outside_64_bit_mode():
    vm = built("90", "prot32", rip=0xFFFFFFFF)
    assert emulate(vm, et.EMULTYPE_SKIP) == 1
    assert vm.rip == 0


def test_skip_without_rf_leaves_rflags():
    vm = built("90")
    vm.vcpu.requests.clear()
    emulate(vm, et.EMULTYPE_SKIP)
    assert KVM_REQ_EVENT not in vm.vcpu.requests


def test_skip_after_userspace_writes_back():
    """With COMPLETE_USER_EXIT the shadow ends and TF steps, as after any emulated instruction."""
    vm = built("0f32", flags=TF, kvm={"interruptibility": 1})
    emulate(vm, et.EMULTYPE_SKIP | et.EMULTYPE_COMPLETE_USER_EXIT)
    assert (vm.rip, vm.pending, vm.shadow, vm.machine.retired) == (0x6002, (DB, None, None), 0, 1)
