"""Exits of system-register instructions: CR, DR, MSR, XSETBV, INVPCID.

KVM: handle_cr, handle_dr, kvm_emulate_rdmsr, kvm_emulate_wrmsr, kvm_complete_insn_gp,
kvm_emulate_xsetbv, handle_invpcid, kvm_handle_invpcid, get_vmx_mem_address.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.arch import exceptions as ex
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDX, VCPU_REGS_RSP
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE, X86EMUL_F_INVLPG, X86EMUL_PROPAGATE_FAULT
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.address import is_noncanonical_address
from emufuzz.kvm.cr import (
    kvm_get_cr8,
    kvm_lmsw,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    kvm_set_cr8,
)
from emufuzz.kvm.debugregs import DR6_BD, DR7_GD, kvm_get_dr, kvm_set_dr
from emufuzz.kvm.exceptions import (
    DR6_ACTIVE_LOW,
    kvm_inject_emulated_page_fault,
    kvm_inject_gp,
    kvm_queue_exception,
    kvm_queue_exception_p,
    kvm_require_dr,
)
from emufuzz.kvm.guest_virt import kvm_read_guest_virt
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.mem_operand import get_vmx_mem_address
from emufuzz.kvm.msr import kvm_get_msr_with_filter, kvm_msr_user_space, kvm_set_msr_with_filter
from emufuzz.kvm.regs import (
    kvm_read_cr0_bits,
    kvm_read_cr3,
    kvm_read_cr4_bits,
    kvm_read_edx_eax,
    kvm_rsp_read,
    kvm_rsp_write,
    vmx_get_exit_qual,
)
from emufuzz.kvm.rflags import KVM_GUESTDBG_USE_HW_BP, kvm_get_linear_rip
from emufuzz.kvm.segments import is_64_bit_mode, vmx_get_cpl
from emufuzz.kvm.vcpu import KVM_EXIT_DEBUG, KVM_EXIT_UNKNOWN, KVM_REQ_TLB_FLUSH_GUEST, Vcpu
from emufuzz.kvm.vmx_bits import CPU_BASED_MOV_DR_EXITING
from emufuzz.kvm.x86 import prepare_emulation_failure_exit
from emufuzz.kvm.x86_completions import complete_userspace_rdmsr
from emufuzz.kvm.xcr import kvm_set_xcr

KVM_EXIT_SET_TPR: Final = "SET_TPR"

# Exit qualification of control-register accesses (SDM Vol. 3C Table 28-3).
CR_NUMBER: Final = 0xF
CR_TYPE_SHIFT: Final = 4
CR_REGISTER_SHIFT: Final = 8
LMSW_SOURCE_DATA_SHIFT: Final = 16
CR_MOV_TO, CR_MOV_FROM, CR_CLTS, CR_LMSW = range(4)

# Exit qualification of debug-register accesses (SDM Vol. 3C Table 28-4).
DEBUG_REG_ACCESS_NUM: Final = 7
TYPE_MOV_FROM_DR: Final = 1 << 4
DR_REGISTER_SHIFT: Final = 8

INVPCID_TYPE_INDIV_ADDR, INVPCID_TYPE_SINGLE_CTXT = 0, 1
INVPCID_TYPE_ALL_INCL_GLOBAL, INVPCID_TYPE_ALL_NON_GLOBAL = 2, 3

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1


class KvmBugError(AssertionError):
    """KVM marks the VM as dead: the exit cannot happen on a processor that KVM has set up."""


def kvm_register_read(vcpu: Vcpu, reg: int) -> int:
    """A GPR as an operand: 32 bits outside 64-bit mode."""
    value = kvm_rsp_read(vcpu) if reg == VCPU_REGS_RSP else vcpu.regs[reg]
    return value if is_64_bit_mode(vcpu) else value & _MASK32


def kvm_register_write(vcpu: Vcpu, reg: int, value: int) -> None:
    """Store a GPR operand, zero-extended outside 64-bit mode."""
    value &= _MASK64 if is_64_bit_mode(vcpu) else _MASK32
    if reg == VCPU_REGS_RSP:
        kvm_rsp_write(vcpu, value)
    else:
        vcpu.regs[reg] = value


def kvm_complete_insn_gp(vcpu: Vcpu, err: int) -> int:
    """#GP if the handler failed, else go on to the next instruction."""
    if err:
        kvm_inject_gp(vcpu)
        return 1
    return kvm_skip_emulated_instruction(vcpu)


# -- control and debug registers -----------------------------------------------------------------


def handle_cr(machine: KvmMachine) -> int:
    """Exit 28. Nested guests' own shadows of CR0 and CR4 are not modelled.

    Raises:
        KvmBugError: CLTS, which never exits as the guest owns CR0.TS.
    """
    vcpu = machine.vcpu
    qualification = vmx_get_exit_qual(vcpu)
    cr = qualification & CR_NUMBER
    reg = qualification >> CR_REGISTER_SHIFT & 15
    kind = qualification >> CR_TYPE_SHIFT & 3
    if kind == CR_MOV_TO and cr in (0, 3, 4, 8):
        return _mov_to_cr(vcpu, cr, kvm_register_read(vcpu, reg))
    if kind == CR_MOV_FROM and cr in (3, 8):
        value = kvm_read_cr3(vcpu) if cr == 3 else kvm_get_cr8(vcpu)
        kvm_register_write(vcpu, reg, value)
        _trace_cr(vcpu, "read", cr, value)
        return kvm_skip_emulated_instruction(vcpu)
    if kind == CR_LMSW:
        value = qualification >> LMSW_SOURCE_DATA_SHIFT & 0xF
        _trace_cr(vcpu, "write", 0, kvm_read_cr0_bits(vcpu, ~0xF) | value)
        kvm_lmsw(vcpu, value)
        return kvm_skip_emulated_instruction(vcpu)
    if kind == CR_CLTS:
        raise KvmBugError("CLTS exited, though the guest owns CR0.TS")
    vcpu.run.leave(KVM_EXIT_UNKNOWN)
    return 0


def _trace_cr(vcpu: Vcpu, rw: str, cr: int, value: int) -> None:
    if vcpu.trace is not None:
        vcpu.trace.emit("kvm_cr", rw=rw, cr=cr, val=value)


def _mov_to_cr(vcpu: Vcpu, cr: int, value: int) -> int:
    """KVM deviation: MOV to CR8 takes the low byte only (SDM Vol. 2B MOV CRn: #GP for reserved bits)."""
    _trace_cr(vcpu, "write", cr, value)
    if cr == 8:
        return _mov_to_cr8(vcpu, value & 0xFF)
    setter = {0: kvm_set_cr0, 3: kvm_set_cr3, 4: kvm_set_cr4}[cr]
    return kvm_complete_insn_gp(vcpu, setter(vcpu, value))


def _mov_to_cr8(vcpu: Vcpu, value: int) -> int:
    """Userspace's APIC has to know when the task priority sinks."""
    before = kvm_get_cr8(vcpu)
    result = kvm_complete_insn_gp(vcpu, kvm_set_cr8(vcpu, value))
    if vcpu.apic is not None or before <= value:
        return result
    vcpu.run.leave(KVM_EXIT_SET_TPR)
    return 0


def handle_dr(machine: KvmMachine) -> int:
    """Exit 29. Without a debugging userspace the registers are given to the guest, which tries again.

    KVM deviation: #UD of DR4 and DR5 ranks above #GP of the privilege level (SDM Vol. 2B MOV DRn).
    """
    vcpu = machine.vcpu
    qualification = vmx_get_exit_qual(vcpu)
    dr = qualification & DEBUG_REG_ACCESS_NUM
    if not kvm_require_dr(vcpu, dr):
        return 1
    if vmx_get_cpl(vcpu):
        return kvm_complete_insn_gp(vcpu, 1)
    dr7 = vcpu.vmcs.values[vf.GUEST_DR7]
    if dr7 & DR7_GD:
        return _general_detect(vcpu, dr7)
    if not vcpu.guest_debug:
        vcpu.vmcs.clear_bits(vf.CPU_BASED_VM_EXEC_CONTROL, CPU_BASED_MOV_DR_EXITING)
        return 1
    reg = qualification >> DR_REGISTER_SHIFT & 15
    if qualification & TYPE_MOV_FROM_DR:
        kvm_register_write(vcpu, reg, kvm_get_dr(vcpu, dr))
        return kvm_complete_insn_gp(vcpu, 0)
    return kvm_complete_insn_gp(vcpu, kvm_set_dr(vcpu, dr, kvm_register_read(vcpu, reg)))


def _general_detect(vcpu: Vcpu, dr7: int) -> int:
    """DR7.GD: #DB for the guest, or for userspace's debugger."""
    if vcpu.guest_debug & KVM_GUESTDBG_USE_HW_BP:
        vcpu.run.leave(
            KVM_EXIT_DEBUG,
            dr6=DR6_BD | DR6_ACTIVE_LOW,
            dr7=dr7,
            pc=kvm_get_linear_rip(vcpu),
            exception=ex.DB_VECTOR,
        )
        return 0
    kvm_queue_exception_p(vcpu, ex.DB_VECTOR, DR6_BD)
    return 1


# -- MSRs and XCR0 -------------------------------------------------------------------------------


def _complete_fast_msr_access(vcpu: Vcpu) -> int:
    return kvm_complete_insn_gp(vcpu, vcpu.run.data["error"])


def _complete_fast_rdmsr(vcpu: Vcpu) -> int:
    complete_userspace_rdmsr(vcpu)
    return _complete_fast_msr_access(vcpu)


def kvm_emulate_rdmsr(machine: KvmMachine) -> int:
    """Exit 31."""
    vcpu = machine.vcpu
    index = vcpu.regs[VCPU_REGS_RCX] & _MASK32
    result, data = kvm_get_msr_with_filter(vcpu, index)
    if result:
        if kvm_msr_user_space(vcpu, index, None, _complete_fast_rdmsr, result):
            return 0
    else:
        vcpu.regs[VCPU_REGS_RAX] = data & _MASK32
        vcpu.regs[VCPU_REGS_RDX] = data >> 32
    if vcpu.trace is not None:
        vcpu.trace.emit("kvm_msr", write=False, ecx=index, data=data, exception=bool(result))
    return kvm_complete_insn_gp(vcpu, result)


def kvm_emulate_wrmsr(machine: KvmMachine) -> int:
    """Exit 32."""
    vcpu = machine.vcpu
    index, data = vcpu.regs[VCPU_REGS_RCX] & _MASK32, kvm_read_edx_eax(vcpu)
    result = kvm_set_msr_with_filter(vcpu, index, data)
    if result and kvm_msr_user_space(vcpu, index, data, _complete_fast_msr_access, result):
        return 0
    if vcpu.trace is not None:
        vcpu.trace.emit("kvm_msr", write=True, ecx=index, data=data, exception=bool(result))
    return kvm_complete_insn_gp(vcpu, result)


def kvm_emulate_xsetbv(machine: KvmMachine) -> int:
    """Exit 55; hardware has looked at CR4.OSXSAVE."""
    vcpu = machine.vcpu
    index = vcpu.regs[VCPU_REGS_RCX] & _MASK32
    if vmx_get_cpl(vcpu) or kvm_set_xcr(vcpu, index, kvm_read_edx_eax(vcpu)):
        kvm_inject_gp(vcpu)
        return 1
    return kvm_skip_emulated_instruction(vcpu)


# -- INVPCID -------------------------------------------------------------------------------------


def handle_invpcid(machine: KvmMachine) -> int:
    """Exit 58."""
    vcpu = machine.vcpu
    if not vcpu.cpuid.has("invpcid"):
        kvm_queue_exception(vcpu, ex.UD_VECTOR)
        return 1
    info = vcpu.vmcs.values[vf.VMX_INSTRUCTION_INFO]
    kind = kvm_register_read(vcpu, info >> 28 & 15)
    gva = get_vmx_mem_address(vcpu, vmx_get_exit_qual(vcpu), info, 16, write=False)
    return 1 if gva is None else _kvm_handle_invpcid(machine, kind, gva)


def _kvm_handle_invpcid(machine: KvmMachine, kind: int, gva: int) -> int:
    vcpu = machine.vcpu
    fault = X86Exception()
    rc, operand = kvm_read_guest_virt(machine.mmu, gva, 16, fault)
    if rc != X86EMUL_CONTINUE:
        return _memory_failure(vcpu, rc, fault)
    pcid, address = int.from_bytes(operand[:8], "little"), int.from_bytes(operand[8:], "little")
    unusable = pcid and not kvm_read_cr4_bits(vcpu, crs.X86_CR4_PCIDE)
    if pcid >> 12 or kind > INVPCID_TYPE_ALL_NON_GLOBAL:
        return kvm_complete_insn_gp(vcpu, 1)
    if kind == INVPCID_TYPE_INDIV_ADDR:
        if unusable or is_noncanonical_address(vcpu, address, X86EMUL_F_INVLPG):
            return kvm_complete_insn_gp(vcpu, 1)
        if pcid == _active_pcid(vcpu):
            machine.mmu.invalidate_addr(address)
    elif kind == INVPCID_TYPE_SINGLE_CTXT:
        if unusable:
            return kvm_complete_insn_gp(vcpu, 1)
        machine.invalidate_pcid(pcid)
    else:
        vcpu.make_request(KVM_REQ_TLB_FLUSH_GUEST)
    return kvm_skip_emulated_instruction(vcpu)


def _active_pcid(vcpu: Vcpu) -> int:
    return kvm_read_cr3(vcpu) & 0xFFF if kvm_read_cr4_bits(vcpu, crs.X86_CR4_PCIDE) else 0


def _memory_failure(vcpu: Vcpu, rc: int, fault: X86Exception) -> int:
    """An operand of a handler cannot be read: #PF, or userspace is told where it is no memory."""
    if rc == X86EMUL_PROPAGATE_FAULT:
        kvm_inject_emulated_page_fault(vcpu, fault)
        return 1
    prepare_emulation_failure_exit(vcpu)
    return 0
