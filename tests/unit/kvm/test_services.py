"""Hypercalls, the local APIC and RSM on a whole machine, entered through their exits."""

from __future__ import annotations

import pytest
from support.machines import PathVm, path_case

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm import smram as sm
from emufuzz.kvm.exits import vmx_handle_exit
from emufuzz.kvm.vcpu import KvmSegment
from emufuzz.subject.kvm.enter import ExitInfo, hardware_exit

VMCALL, RSM, WRMSR = "0f01c1", "0faa", "0f30"
EXIT_WRMSR, EXIT_APIC_ACCESS = 32, 44
VMCALL_EXIT = {"exit_reason": 18, "instruction_length": 3}
LINEAR_WRITE = 1 << 12
PAGE = 0x8000
LAPIC = {"irqchip": True}
X2APIC = ((0x1B, 0xFEE00D00),)
ENABLED = {r.APIC_SPIV: 0x1FF}
SMRAM = 0x3FE00


def run(path, **options):
    return PathVm(path_case(path, **options), trace=True).enter()


def test_vmcall_is_a_hypercall_of_kvm():
    vm = run("exit", code=VMCALL, rax=1, kvm=VMCALL_EXIT)
    assert (vm.reg("rax"), vm.rip) == (0, 0x6003)
    assert "kvm_hypercall" in vm.names()


def test_hypercall_page_is_written_as_userspace_loads_the_msrs():
    msr = ((0x40000000, 1), (0x40000001, PAGE | 1))
    vm = run(
        "exit", code=VMCALL, rcx=2, rdx=PAGE + 0x100, msr=msr, data={PAGE: bytes(0x1000)},
        knobs={"hyperv": True}, kvm=VMCALL_EXIT,
    )  # fmt: skip
    assert vm.mem(PAGE, 4) == b"\x0f\x01\xc1\xc3"
    assert (vm.reg("rax"), vm.rip) == (0, 0x6003)
    assert vm.vcpu.requests & {"HV_TLB_FLUSH", "TLB_FLUSH_GUEST"}


def test_fast_hypercall_takes_its_input_from_xmm():
    msr = ((0x40000000, 1),)
    vm = PathVm(
        path_case(
            "exit", code=VMCALL, rcx=0x15 | 1 << 16 | 1 << 17, rdx=0x41, msr=msr,
            knobs={"hyperv": True, **LAPIC}, kvm={**VMCALL_EXIT, "lapic": ENABLED},
        )
    )  # fmt: skip
    vm.machine.ctxt.fpu.xmm[0] = 1 << 64 | 1  # one bank, with processor 0
    vm.enter()
    assert vm.reg("rax") == 0
    assert vm.vcpu.apic.test_vector(0x41, r.APIC_IRR)


@pytest.mark.parametrize("path", ["apic-access", "fep"])
@pytest.mark.parametrize(
    ("code", "reg", "rax", "stored"),
    [
        ("8b07", r.APIC_LVR, 0x50014, 0x50014),
        ("8907", r.APIC_LVR, 0x77, 0x50014),  # read-only
        ("8907", r.APIC_TASKPRI, 0x77, 0x77),
        ("668907", r.APIC_TASKPRI, 0x77, 0),  # of 2 bytes
        ("0107", r.APIC_TASKPRI, 0x77, 0x77),  # reads and writes
    ],
)
def test_registers_through_the_emulator(path, code, reg, rax, stored):
    vm = run(path, code=code, rdi=0xFEE00000 + reg, rax=0x77, knobs=LAPIC, kvm={"lapic": ENABLED})
    assert (vm.reg("rax"), vm.vcpu.apic.get_reg(reg)) == (rax, stored)
    assert vm.left is False
    assert not vm.exit.data


def test_eoi_shortcut():
    vm = PathVm(
        path_case(
            "apic-access",
            code="8907",
            rdi=0xFEE000B0,
            knobs=LAPIC,
            kvm={"lapic": {**ENABLED, r.APIC_ISR + 0x10: 2}},
        )
    )
    info = ExitInfo(EXIT_APIC_ACCESS, LINEAR_WRITE | r.APIC_EOI, length=2)
    hardware_exit(vm.machine, info, {})
    assert vmx_handle_exit(vm.machine) == 1
    assert vm.vcpu.apic.find_highest_vector(r.APIC_ISR) == -1
    assert vm.machine.emulations == 0
    assert vm.rip == 0x6002


def test_x2apic_icr_by_wrmsr():
    vm = run(
        "exit", code=WRMSR, rcx=0x830, rax=0x41, msr=X2APIC, knobs=LAPIC,
        kvm={
            "exit_reason": EXIT_WRMSR, "instruction_length": 2, "lapic": ENABLED,
            "cpuid": {"features": {"x2apic": True}},
        },
    )  # fmt: skip
    assert vm.vcpu.apic.test_vector(0x41, r.APIC_IRR)
    assert vm.rip == 0x6002


def smram(**changes):
    """A state-save area that goes on in real mode at 0:7000."""
    area = sm.Smram()
    values = {"CR0": 0x10, "RIP": 0x7000, "DR6": 0xFFFF0FF0, **changes}
    for name, value in values.items():
        area.put(getattr(sm, f"{name}_64"), 8, value)
    area.put(sm.GPRS_64, 8, 0x15)  # R15
    for seg in sm.SEGMENTS_64:
        area.put_segment_64(seg, KvmSegment(limit=0xFFFF, type=3, s=int(seg < 6), present=1))
    return bytes(area.data)


@pytest.mark.parametrize("path", ["ud", "fep"])
def test_rsm(path):
    vm = run(path, code=RSM, data={SMRAM: smram()}, kvm={"smm": 1})
    assert (vm.rip, vm.reg("r15"), vm.flags) == (0x7000, 0x15, 2)
    assert not vm.vcpu.smm
    assert vm.outcome().system.cr0 == 0x10
    assert "kvm_smm_transition" in vm.names()


def test_rsm_of_a_bad_state_shuts_down():
    vm = run("ud", code=RSM, data={SMRAM: smram(CR0=0x80000010)}, kvm={"smm": 1})
    assert vm.left
    assert vm.exit.exit_reason == "SHUTDOWN"


def test_rsm_outside_smm():
    assert run("ud", code=RSM).pending == (6, None, None)
