"""Quirks of failures, shadows, breakpoints, halts, task switches and nested guests, through real exits."""

from __future__ import annotations

import pytest
from support.machines import DB, LOW_DEVICE, UD, PathVm, enter, mmio, path_case, unenterable

from emufuzz.kvm.vcpu import KVM_REQ_EVENT
from emufuzz.subject.kvm.paths import PATH_SPECS

IF, TF, RF, NT = 1 << 9, 1 << 8, 1 << 16, 1 << 14
UMIP = 1 << 11  # CR4
RDTSCP = "0f01f9"
STI_BIT, MOV_SS_BIT = 1, 2  # of GUEST_INTERRUPTIBILITY_INFO
MOV_SS, STI = 1, 2  # KVM_X86_SHADOW_INT_*


@pytest.mark.parametrize(("cpl", "reason"), [(0, "INTERNAL_ERROR"), (1, "UNKNOWN"), (3, "UNKNOWN")])
def test_quirk_12_a_failure_at_cpl_0_is_both_ud_and_an_exit(cpl, reason):
    """The instruction is valid, so hardware raises nothing (SDM Vol. 2B RDTSCP)."""
    vm = enter("fep", code=RDTSCP, cpl=cpl)
    assert (vm.pending, vm.exit.exit_reason) == (UD, reason)
    assert vm.left is (cpl == 0)
    assert vm.rip == 0x6005


def test_quirk_12_the_exit_carries_the_bytes_that_were_fetched():
    """Fifteen bytes, or up to the end of the page if the instruction ends there (then NOPs)."""
    vm = enter("fep", code=RDTSCP + "31c0")
    assert vm.exit.data["insn_bytes"] == bytes.fromhex(RDTSCP + "31c0").ljust(15, b"\0")
    assert (vm.exit.data["suberror"], vm.exit.data["flags"], vm.exit.data["insn_size"]) == (1, 1, 15)
    at_end = enter("fep", code=RDTSCP, rip=0x7FF8)
    assert at_end.exit.data["insn_size"] == 3
    assert at_end.exit.data["insn_bytes"] == bytes.fromhex(RDTSCP).ljust(15, b"\x90")


def test_quirk_12_userspace_that_goes_on_gives_the_guest_the_ud():
    """#UD of a valid instruction reaches the guest after the second KVM_RUN."""
    vm = enter("fep", code=RDTSCP).run()
    assert (vm.left, vm.pending) == (False, UD)


def test_quirk_12_a_nested_guest_only_gets_ud():
    """For L2 the exit is left out, at CPL 0 too."""
    vm = enter("fep", code=RDTSCP, kvm={"guest_mode": True})
    assert (vm.left, vm.pending) == (False, UD)


# -- interrupt shadows ---------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["8ed0", "17"])
def test_quirk_17_the_shadow_of_mov_ss_stays_though_the_load_faults(code):
    """A MOV or POP to SS that faults inhibits nothing (SDM Vol. 2B MOV, POP; Vol. 3A 6.8.3)."""
    vm = enter("fep", "prot32", code, rax=0xFFF8, rsp=0xC000, data={0xC000: b"\xf8\xff"})
    assert vm.pending == (13, 0xFFF8, None)
    assert vm.shadow == MOV_SS


def test_quirk_17_another_register_has_no_shadow():
    """Only SS inhibits interrupts (SDM Vol. 3A 6.8.3)."""
    assert enter("fep", code="8ed8", rax=0xFFF8).shadow == 0


@pytest.mark.parametrize("flags", [0, IF])
def test_quirk_18_sti_inhibits_interrupts_even_if_they_were_enabled(flags):
    """STI inhibits for one instruction only if IF was 0 (SDM Vol. 2B STI)."""
    vm = enter("fep", code="fb", flags=flags)
    assert vm.flags & IF
    assert vm.shadow == STI


@pytest.mark.parametrize(
    ("before", "code", "after"),
    [
        (0, "90", 0),
        (STI_BIT, "90", 0),
        (MOV_SS_BIT, "90", 0),
        (STI_BIT, "fb", 0),  # STI; STI: not renewed
        (MOV_SS_BIT, "8ed0", 0),  # as SDM Vol. 3A 6.8.3: only the first of two MOV SS
        (STI_BIT, "8ed0", MOV_SS),
        (MOV_SS_BIT, "fb", STI),
    ],
)
def test_quirks_17_18_a_shadow_is_not_renewed_by_its_own_kind(before, code, after):
    """Hardware renews neither, nor does it chain STI and MOV SS beyond what SDM Vol. 3A 6.8.3 allows."""
    vm = enter("fep", code=code, rax=0x28, kvm={"interruptibility": before})
    assert vm.shadow == after


@pytest.mark.parametrize(("before", "asked"), [(0, False), (STI_BIT, True)])
def test_the_end_of_a_shadow_asks_for_events(before, asked):
    """What was held back is looked at once the shadow is gone (SDM Vol. 3A 6.8.3)."""
    vm = PathVm(path_case("fep", code="90", kvm={"interruptibility": before}))
    vm.enter()
    assert (KVM_REQ_EVENT in vm.vcpu.requests) is asked


# -- breakpoints ---------------------------------------------------------------------------------


def watching(addr: int, kind: int) -> tuple[int, ...]:
    """DR0 at `addr`, enabled for `kind`: 0 = execution, 1 = writes, 2 = I/O, 3 = data; 4 bytes."""
    length = 0 if kind == 0 else 3
    return (addr, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x401 | (kind | length << 2) << 16)


@pytest.mark.parametrize(
    ("path", "code", "kind", "addr"),
    [
        ("ept-violation", "8907", 1, LOW_DEVICE),
        ("ept-violation", "8b07", 3, LOW_DEVICE),
        ("ept-misconfig", "8b07", 3, LOW_DEVICE),
        ("fep", "8907", 1, LOW_DEVICE),
        ("io-string", "6e", 2, 0x60),
        ("fep", "e660", 2, 0x60),
    ],
)
def test_quirk_50_data_and_io_breakpoints_do_not_trap(path, code, kind, addr):
    """Hardware traps after the access (SDM Vol. 3B 17.2.4, 17.3.1.2); emulated accesses never do."""
    vm = enter(
        path, code=code, rdi=LOW_DEVICE, rsi=0x8000, rdx=0x60, dr=watching(addr, kind), cr4=0x628,
        devices=[mmio()],
    )  # fmt: skip
    outcome = vm.finish()
    assert outcome.exception is None
    assert outcome.system.dr[6] == 0xFFFF0FF0


@pytest.mark.parametrize(
    ("path", "code", "at", "state", "hit"),
    [
        ("invalid-guest-state", "90", 0x6000, unenterable(), True),
        ("fep", "90", 0x6005, {"knobs": {"force_emulation_prefix": 3}}, True),
        ("ud", "0f05", 0x6000, {}, False),
        ("ept-violation", "8a07", 0x6000, {"rdi": LOW_DEVICE}, False),
        ("ept-misconfig", "8a07", 0x6000, {"rdi": LOW_DEVICE}, False),
    ],
)
def test_quirk_50_code_breakpoints_only_where_hardware_has_not_looked(path, code, at, state, hit):
    """A breakpoint on the instruction is a fault before it (SDM Vol. 3B 17.3.1.1).

    An exit for memory or #UD comes after hardware's check, which KVM relies on: RF is set here so that
    hardware lets the instruction start, and a #UD or a memory access is what exits.
    """
    flags = RF if not hit else 0
    vm = enter(path, "prot32", code, dr=watching(at, 0), devices=[mmio()], flags=flags, **state)
    assert (vm.pending == (DB, None, None)) is hit
    if hit:
        assert (vm.rip, vm.vcpu.exception.payload) == (at, 1)


@pytest.mark.parametrize(("path", "code"), [("io-string", "6e"), ("desc", "0f0100")])
def test_quirk_50_a_breakpoint_that_rf_held_back_hits_after_the_exit(path, code):
    """Hardware has let the instruction start because of RF, which the exit saves as 0 (SDM Vol. 3C 27.3.3).

    KVM looks for breakpoints once more (kvm_vcpu_check_code_breakpoint), and the guest gets its #DB again.
    """
    vm = enter(
        path,
        "prot32",
        code,
        dr=watching(0x6000, 0),
        flags=RF,
        rdx=0x60,
        rax=0x8000,
        rsi=0x8000,
        cr4=0x620 | UMIP,
    )
    assert (vm.pending, vm.rip) == ((DB, None, None), 0x6000)
    assert not vm.flags & RF


@pytest.mark.parametrize(
    ("flags", "interruptibility", "vendor", "hit"),
    [(0, 0, "intel", True), (RF, 0, "intel", False), (0, 2, "intel", False), (0, 2, "amd", True)],
)
def test_quirk_50_rf_and_mov_ss_hold_a_code_breakpoint_back(flags, interruptibility, vendor, hit):
    """RF suppresses it (SDM Vol. 3B 17.3.1.1), MOV SS on Intel too (SDM Vol. 3A 6.8.3)."""
    vm = enter(
        "invalid-guest-state", "prot32", "90", dr=watching(0x6000, 0), flags=flags, vendor=vendor,
        kvm={"interruptibility": interruptibility}, **unenterable(),
    )  # fmt: skip
    assert (vm.pending == (DB, None, None)) is hit
    assert (vm.rip == 0x6000) is hit


# -- decode faults, halts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fault"),
    [("fep", UD), ("ud", UD), ("invalid-guest-state", (14, 0, LOW_DEVICE))],
)
def test_quirk_62_a_page_fault_of_the_fetch_becomes_ud(path, fault):
    """A fetch that faults is #PF (SDM Vol. 3A 4.7); where #UD or the prefix led to KVM it is #UD."""
    start = 0xAFFF - (5 if path == "fep" else 0)
    state = unenterable() if path == "invalid-guest-state" else {}
    vm = enter(path, "prot32", "8b", rip=start, **state)
    assert vm.pending == fault
    assert vm.rip == 0xAFFF


def test_quirk_62_a_limit_violation_of_the_fetch_becomes_ud():
    """Running over the limit of CS is #GP(0) (SDM Vol. 3A 5.3)."""
    vm = enter("fep", "real", "ea", rip=0xFFFA)
    assert (vm.pending, vm.rip) == (UD, 0xFFFF)


def test_quirk_66_hlt_behind_the_prefix_does_not_halt():
    """HLT stops the processor (SDM Vol. 2A HLT); here the guest runs on with a request left behind."""
    vm = enter("fep", code="f4")
    assert (vm.left, vm.rip) == (False, 0x6006)
    assert vm.vcpu.halt_request


def test_quirk_66_the_request_halts_at_an_unrelated_exit():
    """The guest halts at a later instruction that is not HLT."""
    vm = enter("fep", "real", "f4fa90", knobs={"unrestricted_guest": False})
    assert (vm.left, vm.rip) == (False, 0x6006)
    assert PATH_SPECS["rmode-exception"].enter(vm.machine, {}) == 0
    assert (vm.exit.exit_reason, vm.rip) == ("HLT", 0x6007)
    assert not vm.vcpu.halt_request


def test_quirk_66_where_the_request_is_looked_at_hlt_halts():
    """The loop for invalid state and real mode's exceptions halt as hardware does."""
    vm = enter("invalid-guest-state", "prot32", "f4", **unenterable())
    assert (vm.exit.exit_reason, vm.rip) == ("HLT", 0x6001)


# -- task switches -------------------------------------------------------------------------------

JMP, CALL = 2 << 30, 0


@pytest.mark.parametrize(
    ("selector", "vector"),
    [(0x80, 13), (0x54, 10)],
)
def test_quirk_47_a_fault_in_a_task_switch_is_lost(selector, vector):
    """Hardware raises #GP, #TS or #NP (SDM Vol. 3A 7.3); here the guest runs on behind the JMP."""
    vm = enter(
        "task-switch", "prot32", "ea00000000" + "8000",
        kvm={"exit_qualification": selector | JMP, "instruction_length": 7},
    )  # fmt: skip
    assert vm.machine.ctxt.exception.vector == vector
    assert (vm.left, vm.pending, vm.rip) == (False, None, 0x6007)


def test_quirk_47_what_was_changed_before_the_fault_stays():
    """IRET has cleared NT when the new task turns out to be bad; nothing of it may stay (SDM Vol. 3A 7.3)."""
    vm = enter(
        "task-switch", "prot32", "cf", flags=NT,
        kvm={"exit_qualification": 0x80 | 1 << 30, "instruction_length": 1},
    )  # fmt: skip
    assert (vm.left, vm.pending, vm.rip) == (False, None, 0x6001)


# -- nested guests -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "left", "rip"),
    [([], False, 0x6007), (["pause"], False, 0x6007), (["bus_lock_detection"], True, 0x6005)],
)
def test_quirk_64_pause_is_looked_up_among_the_wrong_controls(wanted, left, rip):
    """PAUSE exiting is bit 30 of the primary controls, which is another one among the secondary
    (SDM Vol. 3C Table 24-6, 24-7): L1 that asks for PAUSE exits gets none, and L1 that detects bus
    locks makes PAUSE fail.
    """
    vm = enter("fep", code="f390", kvm={"guest_mode": {"intercepts": wanted}})
    assert (vm.pending == UD) is left
    assert vm.rip == rip


def test_quirk_64_a_plain_nop_is_not_asked_about():
    """90h without F3 is NOP (SDM Vol. 2B PAUSE), and the table entry of both asks L1."""
    vm = enter("fep", code="90", kvm={"guest_mode": {"intercepts": ["bus_lock_detection"]}})
    assert (vm.pending, vm.rip) == (None, 0x6006)


@pytest.mark.parametrize(
    ("code", "intercepts", "fails"),
    [
        ("0f0107", [], False),
        ("0f0107", ["desc"], True),
        ("e660", ["io"], True),
        ("0fa2", [], True),  # nobody has asked, but KVM does not look
        ("0f31", [], True),
    ],
)
def test_quirk_64_an_intercept_fails_instead_of_exiting_to_l1(code, intercepts, fails):
    """Hardware exits to L1 (SDM Vol. 3C 25.1.3), with the instruction's length in the VMCS."""
    vm = enter("fep", code=code, rdi=0x8000, kvm={"guest_mode": {"intercepts": intercepts}})
    assert (vm.pending == UD) is fails


@pytest.mark.parametrize(("intercepts", "reason"), [([], "rdtscp off"), (["rdtscp"], "rdtscp on")])
def test_quirk_64_rdpid_of_a_nested_guest_is_always_ud(intercepts, reason):
    """RDPID needs only L1's "enable RDTSCP" (SDM Vol. 2B RDPID); with it KVM fails, which is #UD too."""
    vm = enter("fep", code="f30fc7f8", kvm={"guest_mode": {"intercepts": intercepts},
                                            "cpuid": {"features": {"rdpid": True}}})  # fmt: skip
    assert vm.pending == UD, reason
    assert vm.machine.ctxt.have_exception is not bool(intercepts)
