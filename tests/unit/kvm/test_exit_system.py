"""Exits of system-register instructions: qualification in, register out, #GP or the next instruction."""

from __future__ import annotations

from typing import Any

import pytest
from support.exits import GP, UD, Exited

from emufuzz.arch.cr import X86_CR4_OSXSAVE, X86_CR4_PCIDE
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.exit_system import KvmBugError
from emufuzz.kvm.mmu.mmu import KvmMmu
from emufuzz.kvm.regs import kvm_read_cr0, kvm_read_cr3, kvm_read_cr4
from emufuzz.kvm.trace import Trace
from emufuzz.kvm.vcpu import KVM_REQ_TLB_FLUSH_GUEST
from emufuzz.kvm.vmx_bits import CPU_BASED_MOV_DR_EXITING

TO, FROM, CLTS, LMSW = (kind << 4 for kind in range(4))
RAX, RBX, RSP = 0, 3 << 8, 4 << 8
CR, DR = er.EXIT_REASON_CR_ACCESS, er.EXIT_REASON_DR_ACCESS
NEXT = 0x6003


def event_of(vm: Exited, name: str) -> dict[str, Any]:
    assert vm.vcpu.trace is not None
    [event] = [item for item in vm.vcpu.trace.events if item.name == name]
    return event.fields


# -- control registers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cr", "value", "read"),
    [(0, 0x8005003B, kvm_read_cr0), (3, 0x100000, kvm_read_cr3), (4, 0x6A0, kvm_read_cr4)],
)
def test_mov_to_cr(cr: int, value: int, read: Any) -> None:
    vm = Exited(rbx=value)
    vm.vcpu.trace = Trace()
    assert vm.exit(CR, cr | TO | RBX, length=3) == 1
    assert (read(vm.vcpu), vm.pending, vm.rip) == (value, None, NEXT)
    assert event_of(vm, "kvm_cr") == {"rw": "write", "cr": cr, "val": value}


@pytest.mark.parametrize(("cr", "value"), [(0, 1 << 31), (3, 1 << 63 | 1 << 60), (4, 1 << 31), (8, 0x10)])
def test_values_that_are_refused_are_gp(cr: int, value: int) -> None:
    vm = Exited(rbx=value)
    assert vm.exit(CR, cr | TO | RBX, length=3) == 1
    assert (vm.pending, vm.rip) == (GP, 0x6000)


def test_outside_64_bit_mode_the_register_has_32_bits() -> None:
    vm = Exited("prot32", rbx=1 << 40 | 0x80000033)
    assert vm.exit(CR, 0 | TO | RBX, length=3) == 1
    assert (kvm_read_cr0(vm.vcpu), vm.pending) == (0x80000033, None)
    vm.set_reg("rbx", 1 << 40)
    assert vm.exit(CR, 3 | FROM | RBX, length=3) == 1
    assert vm.reg("rbx") == 0x100000


def test_rsp_is_an_operand_as_any_other() -> None:
    vm = Exited(rsp=0x123456789A)
    assert vm.exit(CR, 3 | FROM | RSP, length=3) == 1
    assert vm.reg("rsp") == 0x100000
    assert vm.exit(CR, 3 | TO | RSP, length=3) == 1
    assert kvm_read_cr3(vm.vcpu) == 0x100000


def test_mov_from_cr8() -> None:
    vm = Exited(cr8=9, rbx=1 << 40)
    vm.vcpu.trace = Trace()
    assert vm.exit(CR, 8 | FROM | RBX, length=4) == 1
    assert (vm.reg("rbx"), vm.rip) == (9, 0x6004)
    assert event_of(vm, "kvm_cr") == {"rw": "read", "cr": 8, "val": 9}


@pytest.mark.parametrize(
    ("before", "value", "irqchip", "left"),
    [
        (9, 3, False, True),  # priority sinks: userspace's APIC may have something now
        (3, 9, False, False),
        (3, 3, False, False),
        (9, 3, True, False),
        (9, 0x103, False, True),  # bits above the low byte are not looked at
    ],
)
def test_mov_to_cr8_may_be_userspaces(before: int, value: int, irqchip: bool, left: bool) -> None:
    vm = Exited(cr8=before, rbx=value, knobs={"irqchip": irqchip})
    assert vm.exit(CR, 8 | TO | RBX, length=4) == (not left)
    assert (vm.rip, vm.run.exit_reason) == (0x6004, "SET_TPR" if left else "UNKNOWN")
    assert vm.exit(CR, 8 | FROM | RAX, length=0) == 1
    assert vm.reg("rax") == value & 0xF


def test_lmsw_cannot_leave_protected_mode() -> None:
    vm = Exited()
    vm.vcpu.trace = Trace()
    assert vm.exit(CR, LMSW | 0xFFFA << 16, length=3) == 1
    assert (kvm_read_cr0(vm.vcpu) & 0xF, vm.rip) == (0xB, NEXT)
    assert event_of(vm, "kvm_cr") == {"rw": "write", "cr": 0, "val": kvm_read_cr0(vm.vcpu) & ~0xF | 0xA}


def test_clts_exits_only_if_kvm_is_broken() -> None:
    with pytest.raises(KvmBugError, match="owns CR0"):
        Exited().exit(CR, CLTS)


@pytest.mark.parametrize("qualification", [2 | TO, 1 | TO, 0 | FROM, 4 | FROM])
def test_accesses_that_are_not_intercepted_are_unknown(qualification: int) -> None:
    vm = Exited()
    vm.run.exit_reason = "HLT"
    assert vm.exit(CR, qualification, length=3) == 0
    assert (vm.run.exit_reason, vm.rip) == ("UNKNOWN", 0x6000)


# -- debug registers -------------------------------------------------------------------------------


def test_without_a_debugger_the_guest_gets_the_registers_and_tries_again() -> None:
    vm = Exited()
    assert vm.field(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_MOV_DR_EXITING
    assert vm.exit(DR, 0 | RBX, length=3) == 1
    assert vm.rip == 0x6000
    assert not vm.field(vf.CPU_BASED_VM_EXEC_CONTROL) & CPU_BASED_MOV_DR_EXITING


@pytest.mark.parametrize(("dr", "de", "pending"), [(4, 8, UD), (5, 8, UD), (4, 0, None), (6, 8, None)])
def test_dr4_and_dr5_with_debugging_extensions(dr: int, de: int, pending: Any) -> None:
    vm = Exited(cr4=0x620 | de, kvm={"guest_debug": 3}, rbx=0)
    vm.exit(DR, dr | RBX | 1 << 4, length=3)
    assert vm.pending == pending


def test_ud_of_dr4_ranks_above_the_privilege_level() -> None:
    vm = Exited(cr4=0x628, cpl=3)
    assert vm.exit(DR, 4, length=3) == 1
    assert vm.pending == UD
    vm = Exited(cpl=3)
    assert vm.exit(DR, 0, length=3) == 1
    assert vm.pending == GP


@pytest.mark.parametrize("debug", [0, 1 | 1 << 17])
def test_general_detect(debug: int) -> None:
    dr = (0, 0, 0, 0, 0, 0, 0xFFFF0FF0, 0x2400)
    vm = Exited(dr=dr, kvm={"guest_debug": {"control": debug, "dr": [0, 0, 0, 0, 0, 0, 0, 0x2400]}})
    assert vm.exit(DR, 0 | RBX, length=3) == (not debug)
    assert vm.rip == 0x6000
    if debug:
        data = vm.run.data
        assert vm.run.exit_reason == "DEBUG"
        assert (data["dr6"], data["pc"], data["exception"]) == (0xFFFF2FF0, 0x6000, 1)
        assert data["dr7"] & 0x2000
    else:
        assert vm.pending is not None
        assert (vm.pending[0], vm.vcpu.exception.payload) == (1, 0x2000)


@pytest.mark.parametrize("value", [0x1234, 1 << 40])
def test_under_a_debugger_the_registers_are_emulated(value: int) -> None:
    vm = Exited(rbx=value, kvm={"guest_debug": 1})
    assert vm.exit(DR, 1 | RBX, length=3) == 1
    assert (vm.vcpu.db[1], vm.rip) == (value, NEXT)
    assert vm.exit(DR, 1 | 1 << 4 | RAX, length=3) == 1
    assert (vm.reg("rax"), vm.rip) == (value, 0x6006)


def test_a_value_that_dr7_refuses_is_gp() -> None:
    vm = Exited(rbx=1 << 32, kvm={"guest_debug": 1})
    assert vm.exit(DR, 7 | RBX, length=3) == 1
    assert (vm.pending, vm.rip) == (GP, 0x6000)


# -- MSRs ------------------------------------------------------------------------------------------

STAR, SYSENTER_CS, NO_SUCH = 0xC0000081, 0x174, 0x12345


def test_rdmsr_and_wrmsr() -> None:
    vm = Exited(rcx=1 << 40 | STAR, rax=1 << 40 | 0x55667788, rdx=1 << 40 | 0x11223344)
    vm.vcpu.trace = Trace()
    assert vm.exit(er.EXIT_REASON_MSR_WRITE, length=2) == 1
    fields = {"write": True, "ecx": STAR, "data": 0x1122334455667788, "exception": False}
    assert event_of(vm, "kvm_msr") == fields
    vm.vcpu.trace = Trace()
    vm.set_reg("rax", 0)
    assert vm.exit(er.EXIT_REASON_MSR_READ, length=2) == 1
    assert (vm.reg("rax"), vm.reg("rdx"), vm.rip) == (0x55667788, 0x11223344, 0x6004)
    assert event_of(vm, "kvm_msr") == fields | {"write": False}


@pytest.mark.parametrize("reason", [er.EXIT_REASON_MSR_READ, er.EXIT_REASON_MSR_WRITE])
@pytest.mark.parametrize(("index", "knobs"), [(NO_SUCH, {}), (STAR, {"msr_denied": hex(STAR)})])
def test_an_msr_that_is_refused_is_gp(reason: int, index: int, knobs: Any) -> None:
    vm = Exited(rcx=index, knobs=knobs)
    vm.vcpu.trace = Trace()
    assert vm.exit(reason, length=2) == 1
    assert (vm.pending, vm.rip) == (GP, 0x6000)
    assert event_of(vm, "kvm_msr")["exception"]


@pytest.mark.parametrize(("error", "pending", "rip"), [(0, None, 0x6002), (1, GP, 0x6000)])
@pytest.mark.parametrize("reason", [er.EXIT_REASON_MSR_READ, er.EXIT_REASON_MSR_WRITE])
def test_userspace_may_have_the_last_word(reason: int, error: int, pending: Any, rip: int) -> None:
    vm = Exited(rcx=NO_SUCH, rax=1, rdx=2, knobs={"user_space_msr_mask": 2})
    assert vm.exit(reason, length=2) == 0
    reading = reason == er.EXIT_REASON_MSR_READ
    assert vm.run.exit_reason == ("X86_RDMSR" if reading else "X86_WRMSR")
    assert vm.run.data["index"] == NO_SUCH
    vm.run.data["error"] = error
    if reading:
        vm.run.data["data"] = 0xAABBCCDD11223344
    completion = vm.vcpu.complete_userspace_io
    assert completion is not None
    assert completion(vm.vcpu) == 1
    assert (vm.pending, vm.rip) == (pending, rip)
    loaded = (0x11223344, 0xAABBCCDD) if reading and not error else (1, 2)
    assert (vm.reg("rax"), vm.reg("rdx")) == loaded


# -- XSETBV ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "value", "cpl", "pending"),
    [(0, 3, 0, None), (0, 3, 3, GP), (1, 3, 0, GP), (0, 2, 0, GP), (1 << 32, 3, 0, None)],
)
def test_xsetbv(index: int, value: int, cpl: int, pending: Any) -> None:
    vm = Exited(rcx=index, rax=value, cpl=cpl, cr4=0x620 | X86_CR4_OSXSAVE, xcr0=1)
    assert vm.exit(er.EXIT_REASON_XSETBV, length=3) == 1
    assert (vm.pending, vm.rip) == (pending, 0x6000 if pending else NEXT)
    assert vm.vcpu.xcr0 == (1 if pending else 3)


# -- INVPCID ---------------------------------------------------------------------------------------

#: Memory operand [RAX] in DS, 64-bit address, no index; the type is in RBX.
INFO = 2 << 7 | 3 << 15 | 1 << 22 | 0 << 23 | 3 << 28
INVPCID = {"cpuid": {"features": {"invpcid": True, "pcid": True}}}


def operand(pcid: int, address: int = 0) -> dict[int, bytes]:
    return {0x8000: pcid.to_bytes(8, "little") + address.to_bytes(8, "little")}


def invpcid(kind: int, pcid: int = 0, address: int = 0, **kwargs: Any) -> Exited:
    vm = Exited(rax=0x8000, rbx=kind, data=operand(pcid, address), kvm=INVPCID, **kwargs)
    assert vm.exit(er.EXIT_REASON_INVPCID, length=5, instruction_info=INFO) == 1
    return vm


def test_invpcid_needs_the_feature() -> None:
    vm = Exited(kvm={"cpuid": {"features": {"invpcid": False}}})
    assert vm.exit(er.EXIT_REASON_INVPCID, length=5, instruction_info=INFO) == 1
    assert vm.pending == UD


@pytest.mark.parametrize(
    ("kind", "pcid", "address", "cr4", "cr3", "pending"),
    [
        (0, 0, 0x1000, 0, 0, None),
        (0, 5, 0x1000, X86_CR4_PCIDE, 5, None),
        (0, 5, 0x1000, 0, 0, GP),
        (0, 0, 1 << 63, 0, 0, GP),
        (1, 5, 0, X86_CR4_PCIDE, 0, None),
        (1, 5, 0, 0, 0, GP),
        (2, 0, 0, 0, 0, None),
        (3, 0, 1 << 63, 0, 0, None),
        (4, 0, 0, 0, 0, GP),
        (2, 0x1000, 0, X86_CR4_PCIDE, 0, GP),
    ],
)
def test_invpcid(kind: int, pcid: int, address: int, cr4: int, cr3: int, pending: Any) -> None:
    vm = invpcid(kind, pcid, address, cr4=0x620 | cr4, cr3=0x100000 | cr3)
    assert (vm.pending, vm.rip) == (pending, 0x6000 if pending else 0x6005)
    assert (KVM_REQ_TLB_FLUSH_GUEST in vm.vcpu.requests) is (kind in (2, 3) and pending is None)


@pytest.mark.parametrize(("active", "flushed"), [(5, [0x1000]), (6, [])])
def test_invpcid_drops_an_address_of_the_active_pcid(
    monkeypatch: pytest.MonkeyPatch, active: int, flushed: list[int]
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(KvmMmu, "invalidate_addr", lambda _mmu, address: seen.append(address))
    invpcid(0, 5, 0x1000, cr4=0x620 | X86_CR4_PCIDE, cr3=0x100000 | active)
    assert seen == flushed


def test_an_operand_that_faults() -> None:
    vm = Exited(rax=0xB000, kvm=INVPCID)
    assert vm.exit(er.EXIT_REASON_INVPCID, length=5, instruction_info=INFO) == 1
    assert (vm.pending, vm.rip) == ((14, 0, 0xB000), 0x6000)


def test_an_operand_in_a_register_is_ud() -> None:
    vm = Exited(kvm=INVPCID)
    assert vm.exit(er.EXIT_REASON_INVPCID, length=5, instruction_info=INFO | 1 << 10) == 1
    assert vm.pending == UD


def test_an_operand_in_a_device_is_an_emulation_failure() -> None:
    device = [{"kind": "mmio", "addr": "0xb000", "size": 4096}]
    vm = Exited(rax=0xB000, kvm=INVPCID, devices=device)
    assert vm.exit(er.EXIT_REASON_INVPCID, length=5, instruction_info=INFO) == 0
    assert (vm.run.exit_reason, vm.run.data["suberror"], vm.run.data["flags"]) == ("INTERNAL_ERROR", 1, 0)
    assert vm.run.data["info"][0] == er.EXIT_REASON_INVPCID
