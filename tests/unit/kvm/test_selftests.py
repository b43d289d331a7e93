"""What KVM's own selftests (tools/testing/selftests/kvm/x86_64) assert, on the model."""

from __future__ import annotations

import msgspec
import pytest
from support.machines import DB, FEP, GP, LOW_DEVICE, UD, PathVm, enter, mmio, path_case, unenterable

from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.case.build import build_segments
from emufuzz.kvm.guest_state import vmx_set_segment
from emufuzz.kvm.msr import kvm_get_msr
from emufuzz.kvm.state import segment_in
from emufuzz.subject.kvm.paths import PATH_SPECS

FLDS = "d900"  # FLD dword [RAX], which KVM cannot emulate
TF, RF = 1 << 8, 1 << 16
ENABLE, STEP, HW_BP = 1, 2, 1 << 17
DR6_BS, DR6_QUIET = 0xFFFF4FF0, 0xFFFF0FF0


# -- exit_on_emulation_failure_test, smaller_maxphyaddr_emulation_test ---------------------------


def assert_flds_failed(vm: PathVm) -> None:
    """handle_flds_emulation_failure_exit of flds_emulation.h."""
    data = vm.exit.data
    assert (vm.exit.exit_reason, data["suberror"], data["flags"]) == ("INTERNAL_ERROR", 1, 1)
    assert data["insn_size"] >= 2
    assert data["insn_bytes"][:2] == b"\xd9\x00"


@pytest.mark.parametrize("path", ["ept-violation", "ept-misconfig"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_flds_on_a_device_leaves_with_its_bytes(path, cpl):
    """With the capability the exit comes at any CPL, and nothing is queued for the guest."""
    knobs = {"exit_on_emulation_error": True}
    vm = enter(path, code=FLDS, rax=LOW_DEVICE, cpl=cpl, devices=[mmio()], knobs=knobs)
    assert_flds_failed(vm)
    assert (vm.rip, vm.pending) == (0x6000, None)


def test_userspace_skips_the_instruction_and_the_guest_goes_on():
    knobs = {"exit_on_emulation_error": True}
    vm = enter("ept-violation", code=FLDS, rax=LOW_DEVICE, devices=[mmio()], knobs=knobs)
    vm.set_regs(rip=vm.get_regs().rip + 2)
    vm.run()
    assert (vm.left, vm.rip, vm.pending) == (False, 0x6002, None)


def test_without_the_capability_the_skip_takes_the_ud_away():
    """KVM_SET_REGS forgets the #UD that was queued with the exit (quirk 12)."""
    vm = enter("ept-violation", code=FLDS, rax=LOW_DEVICE, devices=[mmio()])
    assert_flds_failed(vm)
    assert vm.pending == UD
    vm.set_regs(rip=0x6002)
    assert (vm.run().pending, vm.rip) == (None, 0x6002)


def beyond(code: str, pte: int = 0x10_0000_8000, **kwargs) -> PathVm:
    """RDI and RAX point to a page whose entry has a bit beyond the guest's MAXPHYADDR of 36."""
    kvm = {"cpuid": {"maxphyaddr": 36}}
    case = path_case("ept-violation-maxphyaddr", code=code, rdi=0x8000, rax=0x8000, physical=True,
                     kvm=kvm, **kwargs)  # fmt: skip
    entry = {"addr": hex(0x103000 + 8 * 8), "data": (pte | 0x67).to_bytes(8, "little").hex()}
    extra = {**(case.extra or {}), "phys": [*(case.extra or {})["phys"], entry]}
    return PathVm(msgspec.structs.replace(case, extra=extra)).enter()


@pytest.mark.parametrize(("code", "error_code"), [("8b07", 9), ("8907", 0xB)])
@pytest.mark.parametrize(("cpl", "user"), [(0, 0), (3, 4)])
def test_an_address_beyond_maxphyaddr_is_a_reserved_bit(code, error_code, cpl, user):
    vm = beyond(code, cpl=cpl)
    assert (vm.pending, vm.rip) == ((14, error_code | user, 0x8000), 0x6000)


def test_flds_beyond_maxphyaddr_is_a_failure():
    vm = beyond(FLDS, knobs={"exit_on_emulation_error": True})
    assert_flds_failed(vm)
    vm.set_regs(rip=0x6002)
    assert not vm.run().left


# -- vmx_exception_with_invalid_guest_state ------------------------------------------------------


def assert_fails_again(vm: PathVm) -> None:
    for _ in range(2):
        assert vm.left
        assert (vm.exit.exit_reason, vm.exit.data["suberror"]) == ("INTERNAL_ERROR", 1)
        vm.run()


def test_an_exception_raised_in_invalid_state_fails_twice():
    """#UD of the guest's own; the second KVM_RUN meets it pending before anything is emulated."""
    vm = enter("invalid-guest-state", "prot32", "0f0b", **unenterable())
    assert_fails_again(vm)
    assert (vm.pending, vm.rip) == (UD, 0x6000)


def test_an_exception_pending_with_invalid_state_fails_at_once():
    vm = enter("invalid-guest-state", "prot32", "90", kvm={"pending": {"vector": 13, "error_code": 0}},
               **unenterable())  # fmt: skip
    assert vm.machine.emulations == 0
    assert_fails_again(vm)
    assert (vm.pending, vm.rip) == (GP, 0x6000)


def test_an_exception_in_delivery_fails_too():
    pending = {"vector": 13, "error_code": 0, "injected": True}
    vm = enter("invalid-guest-state", "prot32", "90", kvm={"pending": pending}, **unenterable())
    assert_fails_again(vm)


def test_the_vcpu_recovers_with_a_valid_state():
    """The failed runs have harmed nothing: userspace repairs SS, and the guest goes on."""
    vm = enter("invalid-guest-state", "prot32", "0f0b", **unenterable()).run()
    vm.set_regs()
    vmx_set_segment(vm.vcpu, segment_in(build_segments("prot32", 0)["ss"]), VCPU_SREG_SS)
    assert not vm.run().left
    assert (vm.rip, vm.pending) == (0x6000, None)


def test_l2_with_invalid_state_gives_l1_a_triple_fault():
    vm = enter("invalid-guest-state", "prot32", "90", kvm={"guest_mode": True}, **unenterable())
    assert (vm.exit.exit_reason, vm.exit.data["vmexit_reason"]) == ("NESTED_VMEXIT", 2)


# -- userspace_msr_exit_test ---------------------------------------------------------------------

KNOWN, UNKNOWN_MSR = 0x174, 0xDEADBEEF
FILTER, ALL = 4, 7


@pytest.mark.parametrize(("code", "name"), [("0f32", "X86_RDMSR"), ("0f30", "X86_WRMSR")])
@pytest.mark.parametrize(("path", "start"), [("exit", 0x6000), ("msr-completion", 0x6005)])
@pytest.mark.parametrize(
    ("index", "denied", "mask", "reason"),
    [
        (KNOWN, "0x174", FILTER, 4),
        (UNKNOWN_MSR, "", ALL, 2),
        (KNOWN, "0x174", 3, None),
        (UNKNOWN_MSR, "", FILTER, None),
    ],
)
def test_msrs_that_fail_go_to_userspace_for_the_reasons_asked_for(code, name, path, start, index, denied,
                                                                 mask, reason):  # fmt: skip
    knobs = {"user_space_msr_mask": mask, "msr_denied": denied}
    vm = enter(path, code=code, rcx=index, knobs=knobs)
    if reason is None:
        assert (vm.left, vm.pending, vm.rip) == (False, GP, start)
        return
    assert (vm.exit.exit_reason, vm.exit.data["index"], vm.exit.data["reason"]) == (name, index, reason)
    vm.run(error=0, data=0x1_00000002)
    assert (vm.rip, vm.pending) == (start + 2, None)
    assert code == "0f30" or (vm.reg("rax"), vm.reg("rdx")) == (2, 1)


@pytest.mark.parametrize("code", ["0f32", "0f30"])
@pytest.mark.parametrize("path", ["exit", "msr-completion"])
def test_userspace_denies_and_the_guest_gets_gp(path, code):
    vm = enter(path, code=code, rcx=KNOWN, knobs={"user_space_msr_mask": 7, "msr_denied": "0x174"})
    assert vm.run(error=1, data=0).pending == GP


@pytest.mark.parametrize("path", ["exit", "msr-completion"])
def test_an_allowed_msr_stays_in_the_kernel(path):
    vm = enter(
        path, code="0f30", rcx=KNOWN, rax=0x10, knobs={"user_space_msr_mask": 7, "msr_denied": "0x175"}
    )
    assert (vm.left, vm.pending, kvm_get_msr(vm.vcpu, KNOWN)) == (False, None, (0, 0x10))


# -- debug_regs ----------------------------------------------------------------------------------


def registers(*addresses: int, dr7: int) -> list[str]:
    padded = [*addresses, 0, 0, 0, 0][:4]
    return [hex(value) for value in (*padded, 0, 0, 0, dr7)]


@pytest.mark.parametrize(
    ("path", "code", "state"),
    [
        ("exit", "0fa2", {}),  # CPUID
        ("exit", "0f32", {"rcx": 0x174}),  # RDMSR
        ("exit", "0f30", {"rcx": 0x174}),
        ("fep", "0fa2", {}),
        ("fep", "0f32", {"rcx": 0x174}),
        ("fep", "31c0", {}),
    ],
)
def test_userspace_steps_over_what_kvm_does_itself(path, code, state):
    """KVM_GUESTDBG_SINGLESTEP: one KVM_EXIT_DEBUG at the next instruction, DR6.BS, no #DB for the guest."""
    vm = enter(path, code=code, kvm={"guest_debug": ENABLE | STEP}, **state)
    target = 0x6000 + len(code) // 2 + (len(FEP) // 2 if path == "fep" else 0)
    assert vm.exit.exit_reason == "DEBUG"
    assert vm.exit.data == {"exception": DB, "pc": target, "dr6": DR6_BS}
    assert (vm.rip, vm.pending, vm.flags & TF) == (target, None, 0)


@pytest.mark.parametrize(
    ("path", "code"), [("exit", "0fa2"), ("exit", "0f32"), ("fep", "0fa2"), ("fep", "31c0")]
)
def test_the_guest_steps_itself(path, code):
    """RFLAGS.TF: the trap is the guest's, with DR6.BS as payload, and TF stays set."""
    vm = enter(path, code=code, rcx=0x174, flags=TF)
    assert (vm.left, vm.pending, vm.vcpu.exception.payload) == (False, (DB, None, None), 1 << 14)
    assert vm.flags & TF


def test_hlt_overrides_the_exit_of_its_single_step():
    vm = enter("exit", code="f4", kvm={"guest_debug": ENABLE | STEP})
    assert (vm.exit.exit_reason, vm.rip) == ("HLT", 0x6001)


def test_userspace_s_breakpoint_on_emulated_code():
    """KVM_GUESTDBG_USE_HW_BP: the exit names the breakpoint before the instruction has run."""
    dr = registers(0, 0x6005, dr7=0x404)
    knobs = {"force_emulation_prefix": 3}
    vm = enter("fep", code="31c0", kvm={"guest_debug": {"control": ENABLE | HW_BP, "dr": dr}}, knobs=knobs)
    assert vm.exit.exit_reason == "DEBUG"
    assert vm.exit.data == {"exception": DB, "pc": 0x6005, "dr6": DR6_QUIET | 2}
    assert vm.rip == 0x6005


def test_userspace_s_breakpoint_ranks_above_rf():
    """KVM deviation: RF holds only the guest's own breakpoints back (SDM Vol. 3B 17.3.1.1)."""
    dr = registers(0x6000, dr7=0x401)
    vm = enter("invalid-guest-state", "prot32", "90", flags=RF,
               kvm={"guest_debug": {"control": ENABLE | HW_BP, "dr": dr}}, **unenterable())  # fmt: skip
    assert vm.exit.exit_reason == "DEBUG"


def test_the_guest_s_breakpoint_is_a_fault_before_the_instruction():
    vm = enter("fep", code="31c0", rax=5, dr=(0x6005, 0, 0, 0, 0, 0, DR6_QUIET, 0x401),
               knobs={"force_emulation_prefix": 3})  # fmt: skip
    assert (vm.pending, vm.vcpu.exception.payload) == ((DB, None, None), 1)
    assert (vm.rip, vm.reg("rax")) == (0x6005, 5)


@pytest.mark.parametrize("code", ["8b07", "8907"])
def test_a_breakpoint_on_a_device_s_data_does_not_stop(code):
    """The watchpoint of the test is on memory, where hardware traps; on MMIO nobody looks (quirk 50)."""
    dr7 = 0x401 | 0xF << 16
    vm = enter("ept-violation", code=code, rdi=LOW_DEVICE, devices=[mmio()],
               dr=(LOW_DEVICE, 0, 0, 0, 0, 0, DR6_QUIET, dr7))  # fmt: skip
    assert vm.finish().exception is None


@pytest.mark.parametrize("code", ["0f23c0", "0f21c0"])
def test_general_detect_of_the_emulator(code):
    """DR7.GD: #DB with DR6.BD before MOV DR, which is not executed."""
    vm = enter("fep", code=code, rax=5, dr=(7, 0, 0, 0, 0, 0, DR6_QUIET, 0x2400))
    assert (vm.pending, vm.rip, vm.vcpu.db[0]) == ((DB, None, None), 0x6005, 7)
    assert vm.vcpu.dr6 & 1 << 13


# -- monitor_mwait_test --------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["0f01c8", "0f01c9"])
@pytest.mark.parametrize(
    ("disabled", "feature", "faults"),
    [("", True, False), ("", False, False), ("mwait_never_ud_faults", True, False),
     ("mwait_never_ud_faults", False, True)],
)  # fmt: skip
def test_monitor_and_mwait(code, disabled, feature, faults):
    kvm = {"cpuid": {"features": {"mwait": feature}}}
    vm = enter("exit", code=code, kvm=kvm, knobs={"disabled_quirks": disabled})
    assert vm.pending == (UD if faults else None)
    assert vm.rip == (0x6000 if faults else 0x6003)


# -- fix_hypercall_test --------------------------------------------------------------------------

VMCALL, VMMCALL = "0f01c1", "0f01d9"


@pytest.mark.parametrize("path", ["ud", "fep"])
def test_the_other_vendor_s_hypercall_is_patched(path):
    """On Intel VMMCALL becomes VMCALL in the guest's memory; it runs at the same RIP again."""
    vm = enter(path, code=VMMCALL)
    start = 0x6005 if path == "fep" else 0x6000
    assert (vm.rip, vm.pending, vm.mem(start, 3).hex()) == (start, None, VMCALL)


@pytest.mark.parametrize("path", ["ud", "fep"])
def test_without_the_quirk_it_is_ud(path):
    vm = enter(path, code=VMMCALL, knobs={"disabled_quirks": "fix_hypercall_insn"})
    start = 0x6005 if path == "fep" else 0x6000
    assert (vm.rip, vm.pending, vm.mem(start, 3).hex()) == (start, UD, VMMCALL)


def test_the_patched_hypercall_is_made():
    vm = enter("ud", code=VMMCALL, rax=1)
    assert PATH_SPECS["exit"].enter(vm.machine, {}) == 1
    assert (vm.rip, vm.reg("rax")) == (0x6003, 0)


def test_the_vendor_s_own_hypercall_does_not_need_the_quirk():
    vm = enter("exit", code=VMCALL, rax=1, knobs={"disabled_quirks": "fix_hypercall_insn"})
    assert (vm.rip, vm.reg("rax"), vm.mem(0x6000, 3).hex()) == (0x6003, 0, VMCALL)


# -- userspace_io_test ---------------------------------------------------------------------------


def test_userspace_changes_rcx_between_ins_and_its_completion():
    """The page of data is full of AAh; RCX goes from 2 to 1 and from 3 to 8192, which KVM survives."""
    vm = enter("io-string", code="f36c", rcx=2, rdx=0x80, rdi=0x8000)
    assert (vm.exit.data["count"], vm.exit.data["size"]) == (2, 1)
    vm.set_regs(rcx=1)
    vm.run(pio=b"\xaa\xaa")
    assert (vm.mem(0x8000, 2), vm.reg("rcx")) == (b"\xaa\0", 0)
    vm = enter("io-string", code="f36c", rcx=3, rdx=0x80, rdi=0x8000)
    vm.set_regs(rcx=8192)
    vm.run(pio=b"\xaa\xaa\xaa")
    assert (vm.mem(0x8000, 3), vm.reg("rcx"), vm.reg("rdi")) == (b"\xaa" * 3, 8192 - 1024, 0x8400)
