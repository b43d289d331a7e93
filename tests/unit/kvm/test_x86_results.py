"""x86_emulate_instruction, row by row, from the emulator on: retries, results, failures, the tail."""

from __future__ import annotations

import pytest
from support.machines import DB, FEP, GP, UD, PathVm, built, emulate, enter, path_case, unenterable

from emufuzz.emulator.x86emul import EMULATION_INTERCEPTED
from emufuzz.kvm import emultype as et
from emufuzz.kvm import x86
from emufuzz.kvm.exceptions import kvm_queue_exception
from emufuzz.kvm.mmu.shadow import ShadowMmu
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, KVM_REQ_TRIPLE_FAULT

TF, IF, RF, ZF = 1 << 8, 1 << 9, 1 << 16, 1 << 6
FAILS = "0f01f9"  # RDTSCP decodes and cannot be executed
UNKNOWN = "0f0b"
TABLES = 0x100000
DIRECTORY = TABLES + 0x2000  # tables of the lowest level may go out of sync instead


# -- step 7: writes to shadowed tables -----------------------------------------------------------


def shadow_write(code: str, **kwargs) -> PathVm:
    """A write to an unused entry of the guest's own page directory, under shadow paging."""
    pages = {TABLES + 0x1000 * n: b"" for n in range(4)}
    case = path_case("shadow-pf", code=code, rdi=DIRECTORY + 0xFF0, physical=True, data=pages, **kwargs)
    return PathVm(case).enter()


def test_a_store_to_a_page_table_is_emulated():
    vm = shadow_write("488907", rax=0x1234)
    assert (vm.left, vm.rip) == (False, 0x6003)
    assert vm.mem(DIRECTORY + 0xFF0, 8) == (0x1234).to_bytes(8, "little")
    assert vm.machine.mmu.shadow.indirect_pages(DIRECTORY >> 12)


def test_a_store_to_a_page_table_is_told_to_the_shadow_pages(monkeypatch):
    told = []
    monkeypatch.setattr(ShadowMmu, "track_write", lambda _, gpa, size: told.append((gpa, size)))
    shadow_write("488907", rax=0x1234)
    assert told == [(DIRECTORY + 0xFF0, 8)]


def test_another_instruction_is_left_to_the_processor():
    """ADD is not how tables are written: the shadow page goes, and the guest runs natively."""
    vm = shadow_write("480107", rax=0x1234)
    assert (vm.left, vm.rip, vm.pending) == (False, 0x6000, None)
    assert vm.mem(DIRECTORY + 0xFF0, 8) == bytes(8)
    assert not vm.machine.mmu.shadow.indirect_pages(DIRECTORY >> 12)
    assert vm.machine.mmu.last_retry_eip == 0x6000


@pytest.mark.parametrize("code", ["660f7f07", "f30f7f07"])
def test_sse_stores_are_left_to_the_processor(code):
    vm = shadow_write(code)
    assert (vm.left, vm.rip) == (False, 0x6000)


@pytest.mark.parametrize("code", [UNKNOWN, FAILS])
def test_a_failure_on_a_page_table_is_retried_natively(code):
    """What KVM cannot decode or emulate need not fail: without the shadow page there is no exit."""
    vm = built(code)
    assert emulate(vm, et.EMULTYPE_PF | et.EMULTYPE_ALLOW_RETRY_PF, 0x8000) == 1
    assert (vm.pending, vm.rip, vm.exit.exit_reason) == (None, 0x6000, "UNKNOWN")
    assert (vm.machine.mmu.last_retry_eip, vm.machine.mmu.last_retry_addr) == (0x6000, 0x8000)


def test_a_fault_of_the_fetch_ranks_below_the_retry():
    vm = built("8b", rip=0xAFFF)
    assert emulate(vm, et.EMULTYPE_PF | et.EMULTYPE_ALLOW_RETRY_PF, 0x8000) == 1
    assert vm.pending is None


@pytest.mark.parametrize("code", [UNKNOWN, FAILS])
def test_a_failure_of_an_instruction_that_uses_the_table_is_a_failure(code):
    """WRITE_PF_TO_SP: to give up the table would bring the same fault for ever."""
    bits = et.EMULTYPE_PF | et.EMULTYPE_ALLOW_RETRY_PF | et.EMULTYPE_WRITE_PF_TO_SP
    vm = built(code)
    assert emulate(vm, bits, 0x8000) == 0
    assert (vm.pending, vm.exit.exit_reason) == (UD, "INTERNAL_ERROR")


# -- steps 8 and 9: registers and addresses ------------------------------------------------------


def test_a_page_fault_s_address_is_the_guest_physical_one_with_ept():
    vm = built("8b07", rdi=0x8000)
    emulate(vm, et.EMULTYPE_PF, 0x9000)
    assert vm.machine.ctxt.gpa_available
    assert (vm.machine.ctxt.gpa_val, vm.machine.ctxt.exception.address) == (0x9000, 0x9000)


def test_a_page_fault_s_address_is_linear_with_shadow_paging():
    vm = PathVm(path_case("shadow-pf", code="8b07", rdi=0x8000, physical=True))
    emulate(vm, et.EMULTYPE_PF, 0x9000)
    assert not vm.machine.ctxt.gpa_available
    assert vm.machine.ctxt.exception.address == 0x9000


def test_without_a_page_fault_the_address_is_zero():
    vm = built()
    vm.machine.ctxt.exception.address = 0x1234
    emulate(vm)
    assert (vm.machine.ctxt.gpa_available, vm.machine.ctxt.exception.address) == (False, 0)


# -- step 10: results ----------------------------------------------------------------------------


def test_an_intercepted_instruction_resumes_the_guest(monkeypatch):
    """No exit to L1 is modelled on VMX; SVM's result changes nothing more."""
    vm = built("90")
    monkeypatch.setattr(x86, "x86_emulate_insn", lambda *_: EMULATION_INTERCEPTED)
    assert emulate(vm) == 1
    assert (vm.rip, vm.pending, vm.machine.retired) == (0x6000, None, 0)


@pytest.mark.parametrize(
    ("guest_mode", "no_decode", "asked"), [(True, False, True), (None, False, False), (True, True, False)]
)
def test_intercepts_are_checked_for_l2_and_once(monkeypatch, guest_mode, no_decode, asked):
    vm = built("90", kvm={"guest_mode": guest_mode} if guest_mode else None)
    emulate(vm)
    calls = []
    monkeypatch.setattr(
        x86, "x86_emulate_insn", lambda _, check: calls.append(check) or EMULATION_INTERCEPTED
    )
    emulate(vm, et.EMULTYPE_NO_DECODE if no_decode else 0)
    assert calls == [asked]


@pytest.mark.parametrize(
    ("code", "cpl", "guest_mode", "knobs", "result", "pending", "reason"),
    [
        (FAILS, 0, None, {}, 0, UD, "INTERNAL_ERROR"),
        (FAILS, 3, None, {}, 1, UD, "UNKNOWN"),
        (FAILS, 0, True, {}, 1, UD, "UNKNOWN"),
        (FAILS, 0, None, {"exit_on_emulation_error": True}, 0, None, "INTERNAL_ERROR"),
        (FAILS, 3, None, {"exit_on_emulation_error": True}, 0, None, "INTERNAL_ERROR"),
        (FAILS, 3, True, {"exit_on_emulation_error": True}, 0, None, "INTERNAL_ERROR"),
        (UNKNOWN, 0, None, {}, 0, UD, "INTERNAL_ERROR"),
        (UNKNOWN, 3, None, {"exit_on_emulation_error": True}, 0, None, "INTERNAL_ERROR"),
    ],
)
def test_failures(code, cpl, guest_mode, knobs, result, pending, reason):
    vm = built(code, cpl=cpl, knobs=knobs, kvm={"guest_mode": guest_mode} if guest_mode else None)
    assert emulate(vm) == result
    assert (vm.pending, vm.exit.exit_reason, vm.rip) == (pending, reason, 0x6000)


@pytest.mark.parametrize(
    ("code", "state", "fault"),
    [
        ("8b07", {"rdi": 0xE000}, (14, 0, 0xE000)),
        ("8907", {"rdi": 0xE000, "cpl": 3}, (14, 6, 0xE000)),
        ("f7f1", {}, (0, None, None)),
        ("f4", {"cpl": 3}, GP),
        ("8ed8", {"rax": 0xFFF8}, (13, 0xFFF8, None)),
    ],
)
def test_a_fault_is_injected_and_nothing_committed(code, state, fault):
    vm = built(code, flags=ZF | TF, **state)
    assert emulate(vm) == 1
    assert (vm.pending, vm.rip, vm.flags, vm.machine.retired) == (fault, 0x6000, ZF | TF | 2, 0)


def test_a_page_fault_drops_the_translation_of_a_present_page(monkeypatch):
    dropped = []
    vm = PathVm(path_case("ud", code="8907", cpl=3, rdi=0x8000, physical=True))
    vm.machine.mmu.slots.write_guest(TABLES + 0x3000 + 8 * 8, (0x8000 | 1 | 4).to_bytes(8, "little"))
    monkeypatch.setattr(type(vm.machine), "mmu_invalidate_addr", lambda _, addr: dropped.append(addr))
    emulate(vm)
    assert (vm.pending, dropped) == ((14, 7, 0x8000), [0x8000])


def test_a_finished_instruction_counts_and_commits():
    vm = built("01c8", rax=1, rcx=0xFFFFFFFF, kvm={"interruptibility": 1})
    assert emulate(vm) == 1
    assert (vm.rip, vm.flags & (ZF | 1), vm.shadow, vm.machine.retired) == (0x6002, ZF | 1, 0, 1)


@pytest.mark.parametrize(("before", "code", "asked"), [(0, "9d", True), (IF, "9d", False), (0, "90", False)])
def test_interrupts_that_were_enabled_are_looked_for(before, code, asked):
    vm = built(code, flags=before, rsp=0xC000, data={0xC000: (IF | 2).to_bytes(8, "little")})
    vm.vcpu.requests.clear()
    emulate(vm)
    assert (KVM_REQ_EVENT in vm.vcpu.requests) is asked


@pytest.mark.parametrize(
    ("guest_debug", "result", "pending", "reason"),
    [(None, 1, (DB, None, None), "UNKNOWN"), (3, 0, None, "DEBUG")],
)
def test_single_step(guest_debug, result, pending, reason):
    vm = built(
        "90", flags=0 if guest_debug else TF, kvm={"guest_debug": guest_debug} if guest_debug else None
    )
    assert emulate(vm) == result
    assert (vm.pending, vm.exit.exit_reason, vm.rip) == (pending, reason, 0x6001)
    if guest_debug:
        assert (vm.exit.data["dr6"], vm.exit.data["pc"]) == (0xFFFF4FF0, 0x6001)


@pytest.mark.parametrize("code", ["9d", "9c"])
def test_the_tf_of_before_counts(code):
    """POPF that sets TF does not step itself (SDM Vol. 3B 17.3.1.4), PUSHF with TF set does."""
    popped = code == "9d"
    data = {0xC000: (TF | 2).to_bytes(8, "little")}
    vm = built(code, flags=0 if popped else TF, rsp=0xC000 if popped else 0xC800, data=data)
    emulate(vm)
    assert (vm.pending is None) is popped


def test_a_rep_is_one_instruction():
    vm = built("f3aa", rcx=0x10, rdi=0x8000)
    assert emulate(vm) == 1
    assert (vm.machine.restarts, vm.machine.retired, vm.machine.emulations) == (15, 1, 1)


def test_a_request_for_a_shutdown():
    """RSM with a bad state asks for a triple fault, which KVM_RUN turns into an exit."""
    vm = built("0faa", kvm={"smm": True}, data={0x38000: b""})
    vm.vcpu.smbase = 0xE0000
    emulate(vm)
    assert KVM_REQ_TRIPLE_FAULT in vm.vcpu.requests
    assert vm.run().exit.exit_reason == "SHUTDOWN"


def test_nested_monitor_trap_is_owed_after_an_emulated_instruction():
    skipped, vm = (built("90", kvm={"guest_mode": {"mtf": True}}) for _ in range(2))
    emulate(skipped, et.EMULTYPE_SKIP)
    emulate(vm)
    assert (skipped.vcpu.mtf_pending, vm.vcpu.mtf_pending) == (False, True)


# -- emulating until the guest can be entered ----------------------------------------------------


def test_the_loop_goes_on_until_the_state_is_valid():
    """MOV SS repairs the state: the second instruction is the processor's."""
    vm = enter("invalid-guest-state", "prot32", "8ed090", rax=0x28, count=5, **unenterable())
    assert (vm.left, vm.rip, vm.vcpu.emulation_required) == (False, 0x6002, False)


def test_a_signal_ends_the_loop():
    vm = enter("invalid-guest-state", "prot32", "90" * 8, count=3, **unenterable())
    assert (vm.left, vm.exit.exit_reason, vm.rip) == (True, "INTR", 0x6003)


def test_the_forced_prefix_may_clear_rf():
    vm = enter("fep", code="9c", flags=RF, knobs={"force_emulation_prefix": 3})
    assert not vm.flags & RF
    assert vm.rip == 0x6000 + len(FEP) // 2 + 1


def test_a_queued_exception_is_replaced_by_the_one_of_the_instruction():
    vm = built("f7f1")
    kvm_queue_exception(vm.vcpu, 6)
    emulate(vm)
    assert vm.pending == (0, None, None)
