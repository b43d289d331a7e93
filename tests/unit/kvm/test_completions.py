"""KVM_RUN after an exit: devices, MSRs, and userspace that looks at or changes registers meanwhile."""

from __future__ import annotations

import pytest
from support.machines import DB, GP, HIGH_DEVICE, LOW_DEVICE, enter, mmio

from emufuzz.kvm.userspace_regs import kvm_set_regs

TF, IF, ZF, CF = 1 << 8, 1 << 9, 1 << 6, 1
DENIED = {"user_space_msr_mask": 4, "msr_denied": "0x174"}
FILTERED = {**DENIED, "force_emulation_prefix": 1}
SYSENTER_CS = 0x174


# -- devices -------------------------------------------------------------------------------------


def test_a_read_goes_on_without_decoding_again():
    vm = enter("ept-misconfig", code="0307", rdi=LOW_DEVICE, rax=0xFFFFFFFF, devices=[mmio()])
    vm.machine.mmu.slots.write_guest(0x6000, b"\x2b")  # SUB, which a second decode would find
    vm.run(data=b"\1\0\0\0")
    assert (vm.left, vm.rip, vm.reg("rax")) == (False, 0x6002, 0)
    assert vm.flags & (ZF | CF) == ZF | CF


def test_a_read_is_single_stepped_at_its_end():
    vm = enter("ept-misconfig", code="8b07", rdi=LOW_DEVICE, devices=[mmio()], flags=TF)
    assert vm.pending is None
    assert vm.run(data=bytes(4)).pending == (DB, None, None)


def test_a_completed_read_may_fault():
    """DIV by what the device gave: the fault comes after userspace's answer."""
    vm = enter("ept-misconfig", code="f737", rdi=LOW_DEVICE, rax=1, devices=[mmio()])
    vm.run(data=bytes(4))
    assert (vm.left, vm.pending, vm.rip) == (False, (0, None, None), 0x6000)


def test_userspace_that_leaves_more_than_was_asked_for():
    vm = enter("ept-misconfig", code="8a07", rdi=LOW_DEVICE, devices=[mmio()])
    assert vm.run(data=b"\x11\x22\x33").reg("rax") == 0x11


def test_one_completion_is_used_once():
    vm = enter("ept-misconfig", code="8b07", rdi=LOW_DEVICE, devices=[mmio()])
    vm.run(data=bytes(4)).run()
    assert (vm.left, vm.rip) == (False, 0x6002)


def test_several_reads_are_replayed_in_order():
    """CMPS from two devices: the first answer comes from the cache of the second run."""
    devices = [mmio(), mmio(HIGH_DEVICE)]
    vm = enter("ept-misconfig", code="a6", rsi=LOW_DEVICE, rdi=HIGH_DEVICE, devices=devices)
    assert vm.exit.data["phys_addr"] == LOW_DEVICE
    vm.run(data=b"\x05")
    assert vm.exit.data["phys_addr"] == HIGH_DEVICE
    vm.run(data=b"\x05")
    assert (vm.rip, vm.flags & ZF) == (0x6001, ZF)


# -- registers in between ------------------------------------------------------------------------


def test_registers_of_an_unfinished_instruction_are_handed_over():
    """KVM_GET_REGS flushes the emulator's cache: LODS has not moved RSI, POPA has moved RSP."""
    vm = enter("ept-violation", "prot32", "61", rsp=LOW_DEVICE, devices=[mmio()])
    vm.run(data=b"\x11\0\0\0")
    assert (vm.reg("rdi"), vm.reg("rsp")) == (0, LOW_DEVICE)
    regs = vm.get_regs()
    assert (regs.gpr[7], regs.gpr[4], regs.rip) == (0x11, LOW_DEVICE + 4, 0x6000)
    assert (vm.reg("rdi"), vm.reg("rsp")) == (0x11, LOW_DEVICE + 4)


def test_get_regs_hands_over_once():
    vm = enter("ept-violation", "prot32", "61", rsp=LOW_DEVICE, devices=[mmio()])
    assert vm.machine.regs_need_sync_to_vcpu
    vm.get_regs()
    assert not vm.machine.regs_need_sync_to_vcpu


def test_a_completed_instruction_has_nothing_to_hand_over():
    vm = enter("ept-misconfig", code="8b07", rdi=LOW_DEVICE, devices=[mmio()])
    assert vm.machine.regs_need_sync_to_vcpu
    vm.run(data=bytes(4))
    assert not vm.machine.regs_need_sync_to_vcpu


def test_get_regs_after_an_instruction_changes_nothing():
    vm = enter("fep", code="ffc0", rax=1)
    vm.machine.ctxt.regs[0] = 0x99
    vm.machine.ctxt.regs_dirty = 1
    assert vm.get_regs().gpr[0] == 2


def test_set_regs_in_the_middle_of_a_read_counts_for_what_is_read_later():
    """LODS moves userspace's RSI; what the exit read was decided before."""
    vm = enter("ept-misconfig", code="ac", rsi=LOW_DEVICE, devices=[mmio()])
    vm.set_regs(rsi=0x5000)
    assert vm.machine.regs_need_sync_from_vcpu
    vm.run(data=b"\5")
    assert (vm.reg("rax"), vm.reg("rsi")) == (5, 0x5001)
    assert not vm.machine.regs_need_sync_from_vcpu


def test_set_regs_in_the_middle_of_a_read_is_too_late_for_decoded_operands():
    """ADD has fetched RAX when it was decoded, so userspace's value is overwritten."""
    vm = enter("ept-misconfig", code="0307", rdi=LOW_DEVICE, rax=1, devices=[mmio()])
    vm.set_regs(rax=0x100)
    assert vm.run(data=b"\5\0\0\0").reg("rax") == 6


def test_without_set_regs_the_emulator_keeps_its_copy():
    """A register that is changed behind the emulator's back counts for nothing."""
    vm = enter("ept-misconfig", code="ac", rsi=LOW_DEVICE, devices=[mmio()])
    vm.vcpu.regs[6] = 0x5000
    assert vm.run(data=b"\5").reg("rsi") == LOW_DEVICE + 1


def test_rip_and_rflags_of_set_regs_are_lost():
    """They were read when the instruction began, and are written when it ends (unlike a fast IN)."""
    vm = enter("ept-misconfig", code="8b07", rdi=LOW_DEVICE, devices=[mmio()])
    vm.set_regs(rip=0x7000, rflags=2 | CF)
    vm.run(data=bytes(4))
    assert (vm.rip, vm.flags) == (0x6002, 2)


def test_set_regs_forgets_a_pending_exception_but_not_one_in_delivery():
    vm = enter("fep", code="0f0b")
    assert vm.pending == (6, None, None)
    vm.vcpu.exception.injected = True
    vm.set_regs()
    assert not vm.vcpu.exception.pending
    assert vm.vcpu.exception.injected


def test_set_regs_sets_the_fixed_flag_and_takes_16_registers():
    vm = enter("fep", code="90")
    kvm_set_regs(vm.machine, range(16), 0x1234, 0)
    assert vm.get_regs() == (tuple(range(16)), 0x1234, 2)
    with pytest.raises(ValueError, match=r"zip\(\) argument 2"):
        kvm_set_regs(vm.machine, range(15), 0, 0)


# -- MSRs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("path", "start"), [("exit", 0x6000), ("msr-completion", 0x6005)])
def test_rdmsr_by_userspace(path, start):
    knobs = FILTERED if path == "msr-completion" else DENIED
    vm = enter(path, code="0f32", rcx=SYSENTER_CS, rax=0x55, rdx=0x66, knobs=knobs)
    assert (vm.exit.exit_reason, vm.exit.data["index"], vm.rip) == ("X86_RDMSR", SYSENTER_CS, start)
    assert (vm.reg("rax"), vm.reg("rdx")) == (0x55, 0x66)
    vm.run(error=0, data=0x1122334455667788)
    assert (vm.rip, vm.reg("rax"), vm.reg("rdx")) == (start + 2, 0x55667788, 0x11223344)


@pytest.mark.parametrize(("path", "start"), [("exit", 0x6000), ("msr-completion", 0x6005)])
def test_wrmsr_by_userspace(path, start):
    knobs = FILTERED if path == "msr-completion" else DENIED
    vm = enter(path, code="0f30", rcx=SYSENTER_CS, rax=0x55, rdx=0x66, knobs=knobs)
    assert (vm.exit.exit_reason, vm.exit.data["data"], vm.rip) == ("X86_WRMSR", 0x66_00000055, start)
    vm.run(error=0)
    assert (vm.rip, vm.pending) == (start + 2, None)


@pytest.mark.parametrize("code", ["0f30", "0f32"])
@pytest.mark.parametrize(("path", "start"), [("exit", 0x6000), ("msr-completion", 0x6005)])
def test_userspace_refuses_an_msr(path, start, code):
    knobs = FILTERED if path == "msr-completion" else DENIED
    vm = enter(path, code=code, rcx=SYSENTER_CS, rax=0x55, knobs=knobs).run(error=1, data=7)
    assert (vm.rip, vm.pending, vm.reg("rax")) == (start, GP, 0x55)


@pytest.mark.parametrize("code", ["0f30", "0f32"])
@pytest.mark.parametrize("path", ["exit", "msr-completion"])
def test_an_msr_completion_is_single_stepped(path, code):
    knobs = FILTERED if path == "msr-completion" else DENIED
    vm = enter(path, code=code, rcx=SYSENTER_CS, knobs=knobs, flags=TF)
    vm.run(error=0, data=0)
    assert vm.pending == (DB, None, None)


def test_the_end_of_an_emulated_rdmsr_does_not_decode():
    vm = enter("msr-completion", code="0f32", rcx=SYSENTER_CS, knobs=FILTERED)
    vm.machine.mmu.slots.write_guest(0x6005, b"\x0f\x0b")
    assert vm.run(error=0, data=5).rip == 0x6007


def test_userspace_s_registers_rank_below_the_value_it_answers():
    vm = enter("msr-completion", code="0f32", rcx=SYSENTER_CS, knobs=FILTERED)
    vm.set_regs(rax=0x1111, rbx=0x2222)
    vm.run(error=0, data=5)
    assert (vm.reg("rax"), vm.reg("rbx")) == (5, 0x2222)
