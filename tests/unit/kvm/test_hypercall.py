"""KVM's hypercalls: who may call, register width, results, and the one that userspace does."""

from __future__ import annotations

import struct

import pytest
from support.phys import PhysHooks
from support.vcpus import make_vcpu

from emufuzz.kvm import lapic_regs as r
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.hypercall import kvm_emulate_hypercall
from emufuzz.kvm.msr_index import MSR_IA32_TSC
from emufuzz.kvm.regs import kvm_rip_read
from emufuzz.kvm.trace import Trace, format_event

ENOSYS, EPERM, EINVAL, EFAULT, EOPNOTSUPP = -1000, -1, -22, -14, -95
PV_LEAVES = {
    "leaves": [
        {"function": 0x40000000, "ebx": 0x4B4D564B, "ecx": 0x564B4D56, "edx": 0x4D},
        {"function": 0x40000001, "eax": 1 << 11},  # PV_SEND_IPI alone
    ]
}
RAX, RCX, RDX, RBX, RSI = 0, 1, 2, 3, 6
MASK64 = (1 << 64) - 1


def make(mode="prot64", *, nr=0, args=(), **options):
    vcpu = make_vcpu(mode, hooks=PhysHooks(), **options)
    vcpu.regs[RAX] = nr
    for reg, value in zip((RBX, RCX, RDX, RSI), args, strict=False):
        vcpu.regs[reg] = value
    vcpu.vmcs.hw_write(vf.VM_EXIT_INSTRUCTION_LEN, 3)
    return vcpu


def result(vcpu):
    """RAX after a hypercall that goes on in the guest, as a signed number."""
    rip = kvm_rip_read(vcpu)
    assert kvm_emulate_hypercall(vcpu) == 1
    assert kvm_rip_read(vcpu) == rip + 3
    return vcpu.regs[RAX] - (vcpu.regs[RAX] >> 63 << 64)


# fmt: off
RESULTS_CASES = [
    (0,  (),       ENOSYS),
    (1,  (),       0),          # VAPIC_POLL_IRQ
    (2,  (),       ENOSYS),
    (5,  (0, 0),   0),          # KICK_CPU
    (9,  (0, 0),   0),          # CLOCK_PAIRING
    (9,  (0, 1),   EOPNOTSUPP),
    (9,  (1 << 40, 0), EFAULT),
    (10, (1, 0, 0, 0x41),  EOPNOTSUPP),  # SEND_IPI without an APIC
    (10, (1, 0, 0, 0x841), EINVAL),
    (11, (0,),     0),          # SCHED_YIELD
    (12, (0, 1),   ENOSYS),     # MAP_GPA_RANGE, not enabled
    (13, (),       ENOSYS),
    (MASK64, (),   ENOSYS),
    (1 << 32 | 1, (), ENOSYS),
]
# fmt: on


@pytest.mark.parametrize(("nr", "args", "expected"), RESULTS_CASES)
def test_results(nr, args, expected):
    assert result(make(nr=nr, args=args)) == expected


def test_number_has_32_bits_outside_64_bit_mode():
    vcpu = make("compat32", nr=5 << 32 | 1)
    assert result(vcpu) == 0
    vcpu = make("prot32", nr=99)
    assert result(vcpu) == ENOSYS & 0xFFFFFFFF


@pytest.mark.parametrize("nr", [1, 12, 99])
def test_only_the_kernel_may_call(nr):
    vcpu = make("prot64", cpl=3, nr=nr, args=(0, 1), knobs={"hypercall_exits": True})
    assert result(vcpu) == EPERM


def test_trace_has_all_bits():
    vcpu = make("prot32", nr=1 << 40 | 1, args=(1, 2, 3, 1 << 32))
    vcpu.trace = Trace()
    kvm_emulate_hypercall(vcpu)
    assert [format_event(event) for event in vcpu.trace.events] == [
        "kvm_hypercall: nr 0x10000000001 a0 0x1 a1 0x2 a2 0x3 a3 0x100000000"
    ]


@pytest.mark.parametrize(("enforced", "expected"), [(False, 0), (True, ENOSYS)])
@pytest.mark.parametrize("nr", [5, 11])
def test_features_count_where_they_are_enforced(nr, enforced, expected):
    vcpu = make(nr=nr, kvm={"cpuid": PV_LEAVES}, knobs={"enforce_pv_features": enforced})
    assert result(vcpu) == expected


@pytest.mark.parametrize(
    ("mode", "args", "expected", "arrives"),
    [
        ("prot64", (1, 0, 0, 0x41), 1, True),
        ("prot64", (2, 0, 0, 0x41), 0, False),
        ("prot64", (0, 1, (1 << 32) - 64, 0x41), 1, True),
        ("prot32", (0, 1, (1 << 32) - 32, 0x41), 1, True),
        ("prot64", (0, 1, (1 << 32) - 32, 0x41), 0, False),
        ("compat32", (1 << 32, 0, 0, 0x41), 0, False),
    ],
)
def test_send_ipi(mode, args, expected, arrives):
    vcpu = make(
        mode, nr=10, args=args, knobs={"irqchip": True, "enforce_pv_features": True},
        kvm={"cpuid": PV_LEAVES, "lapic": {r.APIC_SPIV: 0x1FF}},
    )  # fmt: skip
    assert result(vcpu) == expected
    assert vcpu.apic.test_vector(0x41, r.APIC_IRR) is arrives


def test_kick_reaches_this_vcpu():
    vcpu = make(nr=5, args=(0, 0), knobs={"irqchip": True})
    assert result(vcpu) == 0
    assert vcpu.apic.pv_unhalted


def test_clock_pairing():
    vcpu = make(nr=9, args=(0xFE0, 0))
    vcpu.msrs[MSR_IA32_TSC] = 0x1234
    vcpu.hooks.phys[0xFE0:0x1020] = b"\xff" * 64
    assert result(vcpu) == 0
    assert vcpu.hooks.phys[0xFE0:0x1020] == struct.pack("<qqQI36x", 0, 0, 0x1234, 0)


# -- MAP_GPA_RANGE -----------------------------------------------------------------------------

EXITS = {"hypercall_exits": True}


@pytest.mark.parametrize(
    ("gpa", "npages"),
    [(0x1001, 1), (0x1000, 0), (0x1000, MASK64), (0xFFFFFFFFFFFFF000, MASK64 - (1 << 52) + 2)],
)
def test_range_must_be_sane(gpa, npages):
    assert result(make(nr=12, args=(gpa, npages), knobs=EXITS)) == EINVAL


@pytest.mark.parametrize(
    ("mode", "flags", "answer", "stored"),
    [("prot64", 1, 5 << 32 | 7, 5 << 32 | 7), ("prot32", 0, 5 << 32 | 7, 7), ("prot64", 1, 0, 0)],
)
def test_userspace_maps(mode, flags, answer, stored):
    vcpu = make(mode, nr=12, args=(0x3000, 2, 0x11), knobs=EXITS)
    rip = kvm_rip_read(vcpu)
    assert kvm_emulate_hypercall(vcpu) == 0
    assert vcpu.run.exit_reason == "HYPERCALL"
    assert vcpu.run.data == {"nr": 12, "args": [0x3000, 2, 0x11], "flags": flags, "ret": 0}
    assert kvm_rip_read(vcpu) == rip
    vcpu.run.data["ret"] = answer
    assert vcpu.complete_userspace_io(vcpu) == 1
    assert (vcpu.regs[RAX], kvm_rip_read(vcpu)) == (stored, rip + 3)


def test_request_with_high_bits_is_answered_and_left_pending():
    vcpu = make("compat32", nr=1 << 32 | 12, args=(0x3000, 2, 0), knobs=EXITS)
    assert result(vcpu) == 0
    assert vcpu.run.exit_reason == "HYPERCALL"
    assert vcpu.complete_userspace_io is not None


def test_hyper_v_comes_first():
    vcpu = make("prot64", cpl=3, nr=1, knobs={"hyperv": True})
    assert result(vcpu) == EPERM
    vcpu.hyperv.guest_os_id = 1
    assert kvm_emulate_hypercall(vcpu) == 1
    assert (vcpu.exception.pending, vcpu.exception.vector) == (True, 6)
