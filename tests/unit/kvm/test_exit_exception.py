"""Exit 0 in KVM's order: what the host keeps, what KVM lends, what goes back to the guest or to userspace."""

from __future__ import annotations

from typing import Any

import pytest
from support.exits import GP, UD, Exited, event, hard

from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.vmx_bits import (
    INTR_TYPE_EXT_INTR,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_NMI_INTR,
    INTR_TYPE_PRIV_SW_EXCEPTION,
    INTR_TYPE_SOFT_EXCEPTION,
)

RESTRICTED = {"unrestricted_guest": False}
SHADOW = {"ept": False, "host_maxphyaddr": 46}
SINGLESTEP, USE_SW_BP, USE_HW_BP = 1 | 2, 1 | 1 << 16, 1 | 1 << 17
FEP = "0f0b6b766d"


@pytest.mark.parametrize(
    "info", [hard(18), event(INTR_TYPE_NMI_INTR, 2), hard(20)], ids=["#MC", "NMI", "#VE"]
)
def test_what_is_the_hosts_resumes_the_guest(info: int) -> None:
    vm = Exited()
    assert vm.exit(0, intr_info=info) == 1
    assert vm.pending is None
    assert (vm.machine.emulations, vm.rip) == (0, 0x6000)


def test_device_not_available_goes_to_the_guest_even_during_a_delivery() -> None:
    vm = Exited()
    assert vm.exception(7, vectoring_info=event(INTR_TYPE_EXT_INTR, 0x20)) == 1
    assert vm.pending == (7, None, None)


# -- #UD -------------------------------------------------------------------------------------------


def test_ud_emulates_what_other_vendors_have() -> None:
    vm = Exited("prot64", "0f38f000", rax=0x8000, data={0x8000: b"\x01\x02\x03\x04"})  # MOVBE EAX, [RAX]
    assert vm.exception(6) == 1
    assert (vm.pending, vm.reg("rax"), vm.rip) == (None, 0x01020304, 0x6004)


@pytest.mark.parametrize("code", ["0f0b", "90"])
def test_ud_stays_ud_for_everything_else(code: str) -> None:
    vm = Exited(code=code)
    assert vm.exception(6) == 1
    assert (vm.pending, vm.rip) == (UD, 0x6000)


def test_ud_in_an_enclave_is_not_looked_at() -> None:
    vm = Exited(code="0f38f000")
    assert vm.exit(0, intr_info=hard(6), full_reason=1 << 27) == 1
    assert (vm.pending, vm.machine.emulations) == (UD, 0)


@pytest.mark.parametrize(
    ("prefix", "knob", "rip", "rax", "rf"),
    [
        (FEP, 0, 0x6000, 0, True),  # the knob is off
        (FEP, 1, 0x6008, 1, False),  # the instruction clears RF as any does
        (FEP, 3, 0x6008, 1, False),
        ("0f0b6b766e", 1, 0x6000, 0, True),  # another UD2
    ],
)
def test_the_forced_emulation_prefix(prefix: str, knob: int, rip: int, rax: int, rf: bool) -> None:
    vm = Exited(code=prefix + "48ffc0", knobs={"force_emulation_prefix": knob}, flags=X86_EFLAGS_RF)
    assert vm.exception(6) == 1
    assert (vm.rip, vm.reg("rax"), bool(vm.flags & X86_EFLAGS_RF)) == (rip, rax, rf)
    assert vm.pending == (None if rax else UD)


@pytest.mark.parametrize(("knob", "stopped"), [(1, False), (3, True)])
def test_without_rf_a_breakpoint_on_the_instruction_behind_the_prefix_hits(knob: int, stopped: bool) -> None:
    dr = (0x6005, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x401)
    vm = Exited(code=FEP + "48ffc0", knobs={"force_emulation_prefix": knob}, flags=X86_EFLAGS_RF, dr=dr)
    assert vm.exception(6) == 1
    assert (vm.pending is not None and vm.pending[0] == 1) is stopped
    assert vm.rip == (0x6005 if stopped else 0x6008)


def test_a_prefix_that_cannot_be_read_is_none() -> None:
    vm = Exited(code="90", knobs={"force_emulation_prefix": 1}, rip=0xB000)
    assert vm.exception(6) == 1
    assert (vm.pending, vm.rip) == (UD, 0xB000)


# -- #GP -------------------------------------------------------------------------------------------


def test_gp_with_an_error_code_is_the_guests() -> None:
    vm = Exited(code="ed", knobs={"enable_vmware_backdoor": True})
    assert vm.exception(13, 0x10) == 1
    assert (vm.pending, vm.machine.emulations) == ((13, 0x10, None), 0)


@pytest.mark.parametrize(
    ("code", "pending", "left"),
    [
        ("ed", None, "IO"),  # IN EAX, DX
        ("48ffc0", GP, "UNKNOWN"),  # INC RAX is none of the backdoor's
        ("0fff", GP, "UNKNOWN"),  # cannot be decoded
    ],
)
def test_the_vmware_backdoor(code: str, pending: Any, left: str) -> None:
    vm = Exited(code=code, knobs={"enable_vmware_backdoor": True}, cpl=3, rdx=0x5658)
    assert vm.exception(13, 0) == (left == "UNKNOWN")
    assert (vm.pending, vm.run.exit_reason) == (pending, left)


# -- exceptions during a delivery, #PF -------------------------------------------------------------


@pytest.mark.parametrize(("vector", "code"), [(14, 9), (0, None), (8, 0), (3, None)])
def test_an_exception_during_a_delivery_is_fatal_unless_a_plain_page_fault(
    vector: int, code: int | None
) -> None:
    vm = Exited(knobs=SHADOW)
    vectoring = event(INTR_TYPE_EXT_INTR, 0x20)
    assert vm.exception(vector, code, vectoring_info=vectoring) == 0
    info = hard(vector) | (0 if code is None else 1 << 11)
    assert vm.run.exit_reason == "INTERNAL_ERROR"
    assert vm.run.data == {"suberror": 2, "data": [vectoring, info, code or 0, 0]}


def test_a_plain_page_fault_during_a_delivery_is_handled() -> None:
    vm = Exited("real", knobs=SHADOW)
    assert vm.exception(14, 0, 0x8000, vectoring_info=event(INTR_TYPE_EXT_INTR, 0x20)) == 1
    assert (vm.pending, vm.machine.emulations) == (None, 0)
    assert vm.vcpu.interrupt.injected  # it goes on


def test_shadow_paging_maps_or_emulates() -> None:
    vm = Exited("real", "a100b0", knobs=SHADOW, devices=[{"kind": "mmio", "addr": "0xb000", "size": 4096}])
    vm.exception(14, 0, 0xB000)
    assert (vm.machine.emulations, vm.run.exit_reason) == (1, "MMIO")


@pytest.mark.parametrize(
    ("code", "physical", "expected"),
    [
        (0, True, (14, 0, 0xB000)),
        (4, True, (14, 4, 0xB000)),
        (1, True, (14, 0, 0xB000)),  # looked up again: the page is absent after all
        (1, False, (14, 0, 0xB000)),
    ],
)
def test_with_ept_a_page_fault_is_the_guests(code: int, physical: bool, expected: Any) -> None:
    vm = Exited(knobs={"allow_smaller_maxphyaddr": True}, physical=physical)
    assert vm.exception(14, code, 0xB000) == 1
    assert vm.pending == expected
    assert vm.machine.emulations == 0


def test_a_fault_that_the_tables_do_not_explain_keeps_its_error_code() -> None:
    vm = Exited(knobs={"allow_smaller_maxphyaddr": True}, physical=True)
    assert vm.exception(14, 3, 0x8000) == 1
    assert vm.pending == (14, 3, 0x8000)


# -- real mode -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("vector", "code"), [(13, 0), (12, 0)])
def test_real_mode_emulates_what_its_stand_in_refuses(vector: int, code: int) -> None:
    vm = Exited("real", "fa", knobs=RESTRICTED, flags=0x200)  # CLI
    assert vm.exception(vector, code) == 1
    assert (vm.rip, vm.flags & 0x200, vm.pending) == (0x6001, 0, None)


@pytest.mark.parametrize("vector", [0, 3, 4, 5, 6, 8, 16])
def test_real_modes_own_exceptions_are_delivered(vector: int) -> None:
    vm = Exited("real", "cc", knobs=RESTRICTED)
    assert vm.exception(vector) == 1
    assert vm.pending == (vector, None, None)
    assert vm.rip == 0x6000


def test_gp_with_an_error_code_is_delivered_without_it() -> None:
    vm = Exited("real", "fa", knobs=RESTRICTED)
    assert vm.exception(13, 0x10) == 1
    assert (vm.pending, vm.machine.emulations) == ((13, None, None), 0)


def test_hlt_in_the_stand_in_halts() -> None:
    vm = Exited("real", "f4", knobs=RESTRICTED)
    assert vm.exception(13, 0) == 0
    assert (vm.run.exit_reason, vm.vcpu.halt_request, vm.rip) == ("HLT", False, 0x6001)


def test_an_instruction_of_the_stand_in_may_leave_for_userspace() -> None:
    vm = Exited("real", "e460", knobs=RESTRICTED)  # IN AL, 60h
    assert vm.exception(13, 0) == 0
    assert vm.run.exit_reason == "IO"


@pytest.mark.parametrize(
    ("vector", "debug", "left"),
    [
        (1, 0, False),
        (1, SINGLESTEP, True),
        (1, USE_HW_BP, True),
        (1, USE_SW_BP, False),
        (3, 0, False),
        (3, USE_SW_BP, True),
        (3, SINGLESTEP, True),
    ],
)
def test_breakpoints_of_real_mode_may_be_the_debuggers(vector: int, debug: int, left: bool) -> None:
    vm = Exited("real", "cc", knobs=RESTRICTED, kvm={"guest_debug": debug})
    assert vm.exception(vector, None, 0x4000, instruction_length=1) == (not left)
    if left:
        assert (vm.run.exit_reason, vm.run.data["exception"]) == ("DEBUG", vector)
    else:
        assert vm.pending is not None
        assert vm.pending[0] == vector


def test_an_exception_that_real_mode_does_not_have_is_not_delivered_as_one_of_its() -> None:
    vm = Exited("real", knobs=RESTRICTED)
    assert vm.exception(17, 0) == 1  # #AC, which real mode does not have
    assert vm.pending == (17, 0, None)


# -- the rest --------------------------------------------------------------------------------------


def test_a_debug_exception_goes_to_the_guest_with_its_dr6_bits() -> None:
    vm = Exited()
    assert vm.exception(1, None, 0x4001) == 1
    assert vm.pending is not None
    assert (vm.pending[0], vm.vcpu.exception.payload, vm.rip) == (1, 0x4001, 0x6000)


def test_int1_is_skipped_as_it_traps() -> None:
    vm = Exited(code="f1", kvm={"interruptibility": 1})
    info = event(INTR_TYPE_PRIV_SW_EXCEPTION, 1)
    assert vm.exit(0, 0, length=1, intr_info=info) == 1
    assert (vm.rip, vm.interruptibility & 3) == (0x6001, 0)
    assert vm.pending is not None


@pytest.mark.parametrize("debug", [SINGLESTEP, USE_HW_BP])
def test_a_debug_exception_of_userspaces_debugger(debug: int) -> None:
    vm = Exited("prot64", kvm={"guest_debug": {"control": debug, "dr": [0x6000, 0, 0, 0, 0, 0, 0, 0x401]}})
    assert vm.exception(1, None, 1) == 0
    data = vm.run.data
    assert vm.run.exit_reason == "DEBUG"
    assert (data["exception"], data["pc"], data["dr6"]) == (1, 0x6000, 0xFFFF0FF1)
    assert data["dr7"] == vm.field(vf.GUEST_DR7)


def test_a_breakpoint_goes_to_userspace_with_its_length_kept() -> None:
    vm = Exited(code="cc", kvm={"guest_debug": USE_SW_BP})
    assert vm.exit(0, intr_info=event(INTR_TYPE_SOFT_EXCEPTION, 3), length=1) == 0
    assert (vm.run.exit_reason, vm.run.data) == ("DEBUG", {"pc": 0x6000, "exception": 3})
    assert vm.vcpu.event_exit_inst_len == 1


@pytest.mark.parametrize(
    ("split_lock", "cpl", "am", "ac", "guests"),
    [
        (False, 0, False, False, True),
        (True, 3, True, True, True),
        (True, 0, True, True, False),
        (True, 3, False, True, False),
        (True, 3, True, False, False),
    ],
)
def test_alignment_checks_may_be_the_hosts_split_locks(
    split_lock: bool, cpl: int, am: bool, ac: bool, guests: bool
) -> None:
    cr0 = 0x80010033 | am << 18
    vm = Exited(knobs={"host_split_lock_detect": split_lock}, cpl=cpl, cr0=cr0, flags=ac << 18)
    assert vm.exception(17, 0) == guests
    if guests:
        assert vm.pending == (17, 0, None)
    else:
        assert (vm.run.exit_reason, vm.run.data) == ("EXCEPTION", {"exception": 17, "error_code": 0})


def test_any_other_exception_is_userspaces() -> None:
    vm = Exited()
    info = hard(11) | INTR_TYPE_HARD_EXCEPTION | 1 << 11
    assert vm.exit(0, intr_info=info, error_code=0x18) == 0
    assert (vm.run.exit_reason, vm.run.data) == ("EXCEPTION", {"exception": 11, "error_code": 0x18})
