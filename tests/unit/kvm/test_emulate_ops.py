"""The emulator's callbacks in KVM, each through an instruction that needs it."""

from __future__ import annotations

import pytest
from support.machines import GP, UD, PathVm, enter, path_case, unenterable

from emufuzz.case.model import Segment
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE, X86EMUL_IO_NEEDED
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.msr import kvm_get_msr
from emufuzz.kvm.regs import kvm_read_cr0, kvm_read_cr3, kvm_read_cr4
from emufuzz.kvm.segments import vmx_get_gdt, vmx_get_idt, vmx_get_segment

TSD, TS = 1 << 2, 1 << 3
NMI_BLOCKED = 1 << 3
#: DS with a limit that real mode on virtual-8086 mode cannot have.
UNREAL = {"ds": Segment(0, 0, 0xFFFFFFFF, 3, 1, p=1, g=1)}


def operations(**kwargs):
    """The callbacks of a machine that has not run."""
    machine = PathVm(path_case("fep", **kwargs)).machine
    return machine, machine.ops, machine.ctxt


@pytest.mark.parametrize(
    ("code", "state", "rax"),
    [
        ("0f20c0", {}, 0x80010033),
        ("0f20d0", {"cr2": 0x1234}, 0x1234),
        ("0f20d8", {}, 0x100000),
        ("0f20e0", {}, 0x620),
        ("440f20c0", {"cr8": 5}, 5),
        ("0f21c0", {"dr": (9, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x400)}, 9),
        ("0f21f8", {}, 0x400),
    ],
)
def test_reads_of_control_and_debug_registers(code, state, rax):
    assert enter("fep", code=code, **state).reg("rax") == rax


def test_unknown_control_registers_read_as_zero_and_cannot_be_written():
    _, ops, ctxt = operations()
    assert ops.get_cr(ctxt, 5) == 0
    assert ops.set_cr(ctxt, 5, 0) == -1


@pytest.mark.parametrize(
    ("code", "rax", "read", "value"),
    [
        ("0f22c0", 0x8000003B | 1 << 32, kvm_read_cr0, 0x8000003B),  # upper bits are dropped (quirk 31)
        ("0f22d8", 0x200000, kvm_read_cr3, 0x200000),
        ("0f22e0", 0x620 | TSD | 1 << 32, kvm_read_cr4, 0x620 | TSD),
        ("0f22d0", 0x123456789A, lambda vcpu: vcpu.cr2, 0x123456789A),
        ("440f22c0", 7, lambda vcpu: vcpu.cr8, 7),
    ],
)
def test_writes_of_control_registers(code, rax, read, value):
    vm = enter("fep", code=code, rax=rax)
    assert (vm.pending, read(vm.vcpu)) == (None, value)


@pytest.mark.parametrize(("code", "rax"), [("0f22c0", 0x80000000), ("0f22e0", 0), ("440f22c0", 16)])
def test_refused_control_registers(code, rax):
    assert enter("fep", code=code, rax=rax).pending == GP


@pytest.mark.parametrize(("code", "read"), [("0f0117", vmx_get_gdt), ("0f011f", vmx_get_idt)])
def test_descriptor_tables_are_loaded(code, read):
    vm = enter("fep", code=code, rdi=0x8000, data={0x8000: b"\x34\x12" + (0x9000).to_bytes(8, "little")})
    assert read(vm.vcpu) == (0x9000, 0x1234)


@pytest.mark.parametrize(("code", "field"), [("0f0107", (0x1000, 0x7F)), ("0f010f", (0x3000, 0xFFF))])
def test_descriptor_tables_are_stored(code, field):
    vm = enter("fep", code=code, rdi=0x8000)
    stored = vm.mem(0x8000, 10)
    assert (int.from_bytes(stored[2:], "little"), int.from_bytes(stored[:2], "little")) == field


def test_a_segment_with_its_upper_base():
    """The base of a system segment has 64 bits, of which the descriptor's second half has 32."""
    machine, ops, ctxt = operations()
    desc = ops.get_segment(ctxt, 6).desc
    ops.set_segment(ctxt, 0x50, desc, 0x12345678, 6)
    assert vmx_get_segment(machine.vcpu, 6).base == 0x12345678_00004000
    assert ops.get_segment(ctxt, 6).base3 == 0x12345678


def test_an_unusable_segment_keeps_its_selector():
    _, ops, ctxt = operations(ldtr=Segment(sel=0x70))
    state = ops.get_segment(ctxt, 7)
    assert (state.usable, state.selector, state.desc.p, state.base3) == (False, 0x70, 0, 0)


def test_limits_are_scaled_both_ways():
    _, ops, ctxt = operations()
    desc = ops.get_segment(ctxt, 3).desc
    assert (desc.limit, desc.g) == (0xFFFFF, 1)
    ops.set_segment(ctxt, 0x28, desc, 0, 3)
    assert ops.get_segment(ctxt, 3).desc.pack() == desc.pack()


@pytest.mark.parametrize("code", ["0f30", "0f32"])
@pytest.mark.parametrize(("rcx", "pending"), [(0x174, None), (0xDEAD, GP)])
def test_msrs(code, rcx, pending):
    vm = enter("fep", code=code, rcx=rcx, rax=0x10)
    assert vm.pending == pending
    if code == "0f30" and pending is None:
        assert kvm_get_msr(vm.vcpu, rcx) == (0, 0x10)


def test_trace_of_msrs():
    vm = enter("fep", code="0f32", rcx=0xDEAD, trace=True)
    events = [event.fields for event in vm.vcpu.trace.events if event.name == "kvm_msr"]
    assert events == [{"write": False, "ecx": 0xDEAD, "data": 0, "exception": True}]


def test_rdpmc_without_a_pmu():
    assert enter("fep", code="0f33").pending == GP


def test_xsetbv():
    vm = enter("fep", code="0f01d1", rax=3, cr4=0x40620, xcr0=1)
    assert (vm.pending, vm.vcpu.xcr0) == (None, 3)
    assert enter("fep", code="0f01d1", rax=2, cr4=0x40620).pending == GP


def test_cpuid_and_its_trace():
    vm = enter("fep", code="0fa2", trace=True)
    assert vm.reg("rbx") == int.from_bytes(b"Genu", "little")
    assert "kvm_cpuid" in vm.names()


@pytest.mark.parametrize(
    ("code", "feature", "mode"),
    [("0f38f007", "movbe", "prot64"), ("f30fc7f8", "rdpid", "prot64"), ("0fae07", "fxsr", "prot32")],
)
@pytest.mark.parametrize("present", [True, False])
def test_features_that_gate_an_instruction(code, feature, mode, present):
    vm = enter("fep", mode, code, rdi=0x8000, kvm={"cpuid": {"features": {feature: present}}})
    assert vm.pending == (None if present else UD)


@pytest.mark.parametrize(("vendor", "pending"), [("intel", UD), ("amd", None)])
def test_the_vendor_decides_about_syscall(vendor, pending):
    """SYSCALL outside 64-bit mode is AMD's alone."""
    msr = ((0xC0000081, 0x8_00000000_0000),)
    vm = enter("ud", "compat32", "0f05", vendor=vendor, efer=0xD01, msr=msr)
    assert vm.pending == pending


def test_iret_unmasks_nmis():
    vm = enter("invalid-guest-state", "real", "cf", rsp=0xC000, count=1, kvm={"interruptibility": 8},
               data={0xC000: bytes(6)}, **UNREAL)  # fmt: skip
    assert vm.rip == 0
    assert not vm.vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & NMI_BLOCKED


def test_wbinvd_and_invlpg_do_nothing_to_the_guest():
    assert enter("fep", code="0f09").rip == 0x6007
    vm = enter("fep", code="0f013f", rdi=0x8000)
    assert (vm.pending, vm.rip) == (None, 0x6008)


def test_the_model_contradicting_itself_is_a_finding():
    _, ops, ctxt = operations()
    with pytest.raises(AssertionError, match="BUG_ON"):
        ops.vm_bugged(ctxt)


def test_a_port_is_asked_once_and_answered_once():
    machine, ops, ctxt = operations()
    assert ops.pio_in_emulated(ctxt, 1, 0x60, 2) is None
    machine.pio.data = b"\x01\x02"
    assert ops.pio_in_emulated(ctxt, 1, 0x60, 2) == b"\x01\x02"
    assert ops.pio_in_emulated(ctxt, 1, 0x60, 2) is None


@pytest.mark.parametrize(("mask", "result"), [(0, 2), (4, X86EMUL_IO_NEEDED)])
def test_a_denied_msr(mask, result):
    machine, ops, ctxt = operations(knobs={"msr_denied": "0x174", "user_space_msr_mask": mask})
    assert ops.get_msr_with_filter(ctxt, 0x174) == (result, 0)
    assert ops.set_msr_with_filter(ctxt, 0x174, 0) == result
    assert (machine.vcpu.complete_userspace_io is not None) is bool(mask)


def test_without_a_nested_guest_nothing_is_intercepted():
    _, ops, ctxt = operations()
    assert ops.intercept(ctxt, 0) == X86EMUL_CONTINUE


@pytest.mark.parametrize(("smm", "pending"), [(False, UD), (True, None)])
def test_rsm_is_for_smm(smm, pending):
    vm = PathVm(path_case("fep", code="0faa", kvm={"smm": smm}))
    machine = vm.machine
    assert machine.ops.is_smm(machine.ctxt) is smm
    assert vm.enter().pending == pending


def test_clts_where_the_state_cannot_be_entered():
    vm = enter("invalid-guest-state", "prot32", "0f06", cr0=0x80000039, **unenterable())
    assert not kvm_read_cr0(vm.vcpu) & TS
