"""Debug registers (SDM Vol. 3B 17.2), code breakpoints, single step, userspace's debugger."""

from __future__ import annotations

import pytest
from support.vcpus import make_vcpu

from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.debugregs import (
    kvm_get_dr,
    kvm_set_dr,
    kvm_set_guest_debug,
    kvm_vcpu_check_code_breakpoint,
    kvm_vcpu_check_hw_bp,
    kvm_vcpu_do_singlestep,
)
from emufuzz.kvm.regs import kvm_rip_write
from emufuzz.kvm.rflags import kvm_get_rflags, kvm_set_rflags, set_rflags_no_event
from emufuzz.kvm.rflags_read import vmx_get_rflags

TF, RF = 1 << 8, 1 << 16
ENABLE, STEP, SW_BP, HW_BP, INJECT_DB, INJECT_BP = 1, 2, 1 << 16, 1 << 17, 1 << 18, 1 << 19
RIP = 0x1000


def at_rip(**kwargs):
    vcpu = make_vcpu(**kwargs)
    kvm_rip_write(vcpu, RIP)
    return vcpu


@pytest.mark.parametrize(
    ("dr", "val", "result", "alias", "read"),
    [
        (0, (1 << 64) - 1, 0, 0, (1 << 64) - 1),
        (3, 0x1234, 0, 3, 0x1234),
        (6, 0, 0, 4, 0xFFFF0FF0),
        (6, 0xFFFFFFFF, 0, 4, 0xFFFFEFFF),
        (4, 1 << 14, 0, 6, 0xFFFF4FF0),
        (6, 1 << 32, 1, 4, 0xFFFF0FF0),
        (7, 0xFFFFFFFF, 0, 5, 0xFFFF2FFF),
        (5, 0, 0, 7, 0x400),
        (7, 1 << 63, 1, 5, 0x400),
    ],
)
def test_values(dr, val, result, alias, read):
    vcpu = make_vcpu()
    assert kvm_set_dr(vcpu, dr, val) == result
    assert kvm_get_dr(vcpu, dr) == kvm_get_dr(vcpu, alias) == read
    assert vcpu.vmcs.read(vf.GUEST_DR7) == vcpu.dr7


@pytest.mark.parametrize(("feature", "cleared"), [("rtm", 1 << 16), ("bus_lock_detect", 1 << 11)])
def test_active_low_bits_of_features(feature, cleared):
    vcpu = make_vcpu(kvm={"cpuid": {"features": {feature: True}}})
    kvm_set_dr(vcpu, 6, 0)
    assert kvm_get_dr(vcpu, 6) == 0xFFFF0FF0 & ~cleared
    assert kvm_set_dr(vcpu, 6, cleared) == 0
    assert kvm_get_dr(vcpu, 6) == 0xFFFF0FF0


@pytest.mark.parametrize(
    ("addr", "kind", "dr7", "dr6"),
    [
        (0x10, 0, 0x1, 1),
        (0x10, 0, 0x2, 1),
        (0x11, 0, 0x1, 0),
        (0x20, 0, 0x1, 0),
        (0x20, 0, 0x5, 2),
        (0x40, 1, 0x01000040 | 0x1 << 28, 8),
        (0x10, 0, 0x10001, 0),  # a data breakpoint
        (0x10, 0, 0x0, 0),
    ],
)
def test_breakpoint_match(addr, kind, dr7, dr6):
    assert kvm_vcpu_check_hw_bp(addr, kind, dr7, [0x10, 0x20, 0x30, 0x40]) == dr6


@pytest.mark.parametrize(
    ("rflags", "shadow", "vendor", "result"),
    [(0, 0, "intel", 1), (RF, 0, "intel", None), (0, 2, "intel", None), (0, 1, "intel", 1), (0, 2, "amd", 1)],
)
def test_guest_code_breakpoint(rflags, shadow, vendor, result):
    vcpu = at_rip(rflags=rflags, vendor=vendor, kvm={"interruptibility": shadow})
    kvm_set_dr(vcpu, 1, RIP)
    kvm_set_dr(vcpu, 7, 4)
    assert kvm_vcpu_check_code_breakpoint(vcpu) == result
    assert vcpu.exception.pending is bool(result)
    assert not result or (vcpu.exception.vector, vcpu.exception.payload) == (1, 2)


def test_userspace_breakpoints_hide_the_guests():
    vcpu = at_rip(
        kvm={"guest_debug": {"control": ENABLE | HW_BP, "dr": [hex(RIP), 0, 0, 0, 0, 0, 0, "0x401"]}}
    )
    assert vcpu.vmcs.read(vf.GUEST_DR7) == 0x401
    kvm_set_dr(vcpu, 0, 0x5555)
    kvm_set_dr(vcpu, 7, 0)
    assert vcpu.eff_db[0] == RIP
    assert vcpu.vmcs.read(vf.GUEST_DR7) == 0x401
    assert kvm_vcpu_check_code_breakpoint(vcpu) == 0
    assert vcpu.run.exit_reason == "DEBUG"
    assert vcpu.run.data == {"dr6": 0xFFFF0FF1, "pc": RIP, "exception": 1}
    assert not vcpu.exception.pending


def test_no_breakpoint_no_exit():
    vcpu = at_rip()
    assert kvm_vcpu_check_code_breakpoint(vcpu) is None
    kvm_set_guest_debug(vcpu, ENABLE | HW_BP, [RIP + 1, 0, 0, 0, 0, 0, 0, 0x401])
    assert kvm_vcpu_check_code_breakpoint(vcpu) is None


def test_single_step_by_the_guest_and_by_userspace():
    vcpu = at_rip()
    assert kvm_vcpu_do_singlestep(vcpu) == 1
    assert (vcpu.exception.vector, vcpu.exception.payload) == (1, 1 << 14)
    vcpu = at_rip(kvm={"guest_debug": ENABLE | STEP})
    assert kvm_vcpu_do_singlestep(vcpu) == 0
    assert vcpu.run.data == {"dr6": 0xFFFF4FF0, "pc": RIP, "exception": 1}
    assert not vcpu.exception.pending


def test_userspace_hides_its_tf():
    vcpu = make_vcpu()
    kvm_set_guest_debug(vcpu, ENABLE | STEP)
    assert vmx_get_rflags(vcpu) == 2 | TF
    assert kvm_get_rflags(vcpu) == 2
    set_rflags_no_event(vcpu, 0x202)
    assert vmx_get_rflags(vcpu) == 0x202 | TF
    kvm_rip_write(vcpu, 0x9999)  # beyond the instruction that is stepped
    kvm_set_rflags(vcpu, 0x202)
    assert vmx_get_rflags(vcpu) == 0x202
    assert "EVENT" in vcpu.requests


def test_debugging_ends_without_enable():
    vcpu = make_vcpu()
    kvm_set_guest_debug(vcpu, ENABLE | STEP)
    kvm_set_guest_debug(vcpu, STEP)
    assert vcpu.guest_debug == 0
    assert vmx_get_rflags(vcpu) == 2


@pytest.mark.parametrize(("control", "vector"), [(INJECT_DB, 1), (INJECT_BP, 3)])
def test_userspace_injects_one_event(control, vector):
    vcpu = make_vcpu()
    assert kvm_set_guest_debug(vcpu, ENABLE | control)
    assert vcpu.exception.vector == vector
    assert not kvm_set_guest_debug(vcpu, ENABLE | control)
