"""Exit 0: exceptions of the guest, among them all that stand for something else.

KVM: handle_exception_nmi, handle_ud, handle_rmode_exception, rmode_exception,
kvm_fixup_and_inject_pf_error.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import exceptions as ex
from emufuzz.arch.cr import X86_CR0_AM
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_RF
from emufuzz.emulator.ctxt import X86Exception
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.emultype import EMULTYPE_TRAP_UD, EMULTYPE_TRAP_UD_FORCED, EMULTYPE_VMWARE_GP
from emufuzz.kvm.exceptions import (
    DR6_ACTIVE_LOW,
    kvm_inject_page_fault,
    kvm_queue_exception,
    kvm_queue_exception_e,
    kvm_queue_exception_p,
)
from emufuzz.kvm.exit_instruction import kvm_emulate_halt_noskip
from emufuzz.kvm.exit_memory import kvm_handle_page_fault
from emufuzz.kvm.guest_virt import kvm_read_guest_virt
from emufuzz.kvm.interruptibility import skip_emulated_instruction
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.options import FEP_CLEAR_RFLAGS_RF
from emufuzz.kvm.regs import (
    kvm_read_cr0_bits,
    kvm_rip_read,
    kvm_rip_write,
    vmx_get_exit_qual,
    vmx_get_intr_info,
)
from emufuzz.kvm.rflags import (
    KVM_GUESTDBG_SINGLESTEP,
    KVM_GUESTDBG_USE_HW_BP,
    KVM_GUESTDBG_USE_SW_BP,
    kvm_get_linear_rip,
    kvm_get_rflags,
    kvm_set_rflags,
)
from emufuzz.kvm.segments import vmx_get_cpl
from emufuzz.kvm.vcpu import KVM_EXIT_DEBUG, Vcpu
from emufuzz.kvm.vmx_bits import (
    INTR_INFO_DELIVER_CODE_MASK,
    INTR_INFO_INTR_TYPE_MASK,
    INTR_INFO_VALID_MASK,
    INTR_INFO_VECTOR_MASK,
    INTR_TYPE_HARD_EXCEPTION,
    INTR_TYPE_NMI_INTR,
    INTR_TYPE_PRIV_SW_EXCEPTION,
)
from emufuzz.kvm.vmx_check import vmx_check_emulate_instruction
from emufuzz.kvm.x86 import KVM_EXIT_INTERNAL_ERROR

KVM_EXIT_EXCEPTION: Final = "EXCEPTION"
KVM_INTERNAL_ERROR_SIMUL_EX: Final = 2
#: UD2, then "kvm": the prefix that asks KVM to emulate the instruction behind it.
KVM_EMULATE_PREFIX: Final = b"\x0f\x0bkvm"

_LAST_VMENTRY_CPU: Final = 0
_MASK64: Final = (1 << 64) - 1
#: Exceptions of real mode that a guest in the vm86 stand-in can raise itself.
_RMODE_VECTORS: Final = frozenset({
    ex.DE_VECTOR, ex.OF_VECTOR, ex.BR_VECTOR, ex.UD_VECTOR, ex.DF_VECTOR, ex.SS_VECTOR, ex.GP_VECTOR,
    ex.MF_VECTOR,
})  # fmt: skip
_VE_VECTOR: Final = 20
_DEBUGGED: Final = KVM_GUESTDBG_SINGLESTEP | KVM_GUESTDBG_USE_HW_BP


def _is_exception(intr_info: int, vector: int) -> bool:
    mask = INTR_INFO_VALID_MASK | INTR_INFO_INTR_TYPE_MASK | INTR_INFO_VECTOR_MASK
    return intr_info & mask == INTR_INFO_VALID_MASK | INTR_TYPE_HARD_EXCEPTION | vector


def _is_nmi(intr_info: int) -> bool:
    mask = INTR_INFO_VALID_MASK | INTR_INFO_INTR_TYPE_MASK
    return intr_info & mask == INTR_INFO_VALID_MASK | INTR_TYPE_NMI_INTR


def handle_exception_nmi(machine: KvmMachine) -> int:
    """Exit 0, in KVM's order of what is looked for."""
    vcpu = machine.vcpu
    intr_info = vmx_get_intr_info(vcpu)
    if _is_exception(intr_info, ex.MC_VECTOR) or _is_nmi(intr_info):
        return 1  # done with interrupts off
    if _is_exception(intr_info, ex.NM_VECTOR):
        kvm_queue_exception(vcpu, ex.NM_VECTOR)
        return 1
    if _is_exception(intr_info, ex.UD_VECTOR):
        return handle_ud(machine)
    if _is_exception(intr_info, _VE_VECTOR):
        return 1
    error_code = 0
    if intr_info & INTR_INFO_DELIVER_CODE_MASK:
        error_code = vcpu.vmcs.values[vf.VM_EXIT_INTR_ERROR_CODE]
    if not vcpu.rmode.vm86_active and _is_exception(intr_info, ex.GP_VECTOR):
        return _handle_vmware_gp(machine, error_code)
    page_fault = _is_exception(intr_info, ex.PF_VECTOR)
    vectoring = vcpu.vmcs.values[vf.IDT_VECTORING_INFO_FIELD]
    if vectoring & INTR_INFO_VALID_MASK and (not page_fault or error_code & ex.PFERR_RSVD):
        data = [vectoring, intr_info, error_code, _LAST_VMENTRY_CPU]
        vcpu.run.leave(KVM_EXIT_INTERNAL_ERROR, suberror=KVM_INTERNAL_ERROR_SIMUL_EX, data=data)
        return 0
    if page_fault:
        return _handle_page_fault(machine, error_code)
    vector = intr_info & INTR_INFO_VECTOR_MASK
    if vcpu.rmode.vm86_active and _rmode_exception(vcpu, vector):
        return handle_rmode_exception(machine, vector, error_code)
    return _handle_other(vcpu, vector, intr_info, error_code)


def handle_ud(machine: KvmMachine) -> int:
    """#UD: instructions that this host lacks, and with the knob anything behind the prefix."""
    vcpu = machine.vcpu
    if not vmx_check_emulate_instruction(vcpu):
        return 1
    emulation_type = EMULTYPE_TRAP_UD
    flags = vcpu.options.force_emulation_prefix
    if flags and _at_prefix(machine):
        if flags & FEP_CLEAR_RFLAGS_RF:
            kvm_set_rflags(vcpu, kvm_get_rflags(vcpu) & ~X86_EFLAGS_RF)
        kvm_rip_write(vcpu, kvm_rip_read(vcpu) + len(KVM_EMULATE_PREFIX) & _MASK64)
        emulation_type = EMULTYPE_TRAP_UD_FORCED
    return machine.emulate(emulation_type)


def _at_prefix(machine: KvmMachine) -> bool:
    rip = kvm_get_linear_rip(machine.vcpu)
    rc, code = kvm_read_guest_virt(machine.mmu, rip, len(KVM_EMULATE_PREFIX), X86Exception())
    return rc == X86EMUL_CONTINUE and code == KVM_EMULATE_PREFIX


def _handle_vmware_gp(machine: KvmMachine, error_code: int) -> int:
    """VMware's backdoor ports may be used at any privilege level; they never have an error code."""
    if error_code:
        kvm_queue_exception_e(machine.vcpu, ex.GP_VECTOR, error_code)
        return 1
    return machine.emulate(EMULTYPE_VMWARE_GP)


def _handle_page_fault(machine: KvmMachine, error_code: int) -> int:
    vcpu = machine.vcpu
    cr2 = vmx_get_exit_qual(vcpu)
    if not vcpu.options.ept:
        return kvm_handle_page_fault(machine, error_code, cr2)
    kvm_fixup_and_inject_pf_error(machine, cr2, error_code)
    return 1


def kvm_fixup_and_inject_pf_error(machine: KvmMachine, gva: int, error_code: int) -> None:
    """The guest faulted by itself; its own MAXPHYADDR may be a reason that hardware did not see.

    A fault on a present page is looked up again, so that reserved bits rank first.
    """
    fault = X86Exception()
    access = error_code & (ex.PFERR_WRITE | ex.PFERR_FETCH | ex.PFERR_USER)
    clean = not error_code & ex.PFERR_PRESENT
    if clean or machine.mmu.gva_to_gpa(gva, access, fault) != _MASK64:
        fault.vector = ex.PF_VECTOR
        fault.error_code_valid = True
        fault.error_code = error_code
        fault.nested_page_fault = False
        fault.address = gva
    kvm_inject_page_fault(machine.vcpu, fault)


def _rmode_exception(vcpu: Vcpu, vector: int) -> bool:
    """The exception is for real mode's own handlers; #BP and #DB may be a debugger's."""
    debugged = _DEBUGGED
    if vector == ex.BP_VECTOR:
        vcpu.event_exit_inst_len = vcpu.vmcs.values[vf.VM_EXIT_INSTRUCTION_LEN]
        debugged |= KVM_GUESTDBG_USE_SW_BP
    if vector in (ex.BP_VECTOR, ex.DB_VECTOR):
        return not vcpu.guest_debug & debugged
    return vector in _RMODE_VECTORS


def handle_rmode_exception(machine: KvmMachine, vector: int, error_code: int) -> int:
    """Real mode in its vm86 stand-in: #GP and #SS without a code are emulated, the rest is delivered."""
    vcpu = machine.vcpu
    if vector not in (ex.GP_VECTOR, ex.SS_VECTOR) or error_code:
        kvm_queue_exception(vcpu, vector)
        return 1
    if not machine.emulate(0):
        return 0
    if vcpu.halt_request:
        vcpu.halt_request = False
        return kvm_emulate_halt_noskip(machine)
    return 1


def _handle_other(vcpu: Vcpu, vector: int, intr_info: int, error_code: int) -> int:
    if vector == ex.DB_VECTOR:
        if not vcpu.guest_debug & _DEBUGGED:
            if intr_info & INTR_INFO_INTR_TYPE_MASK == INTR_TYPE_PRIV_SW_EXCEPTION:
                skip_emulated_instruction(vcpu)  # INT1, which traps
            kvm_queue_exception_p(vcpu, ex.DB_VECTOR, vmx_get_exit_qual(vcpu))
            return 1
        dr6 = vmx_get_exit_qual(vcpu) | DR6_ACTIVE_LOW
        return _leave_for_debugger(vcpu, vector, dr6=dr6, dr7=vcpu.vmcs.values[vf.GUEST_DR7])
    if vector == ex.BP_VECTOR:
        return _leave_for_debugger(vcpu, vector)
    if vector == ex.AC_VECTOR and _guest_inject_ac(vcpu):
        kvm_queue_exception_e(vcpu, ex.AC_VECTOR, error_code)
        return 1
    vcpu.run.leave(KVM_EXIT_EXCEPTION, exception=vector, error_code=error_code)
    return 0


def _leave_for_debugger(vcpu: Vcpu, vector: int, **registers: int) -> int:
    vcpu.event_exit_inst_len = vcpu.vmcs.values[vf.VM_EXIT_INSTRUCTION_LEN]
    vcpu.run.leave(KVM_EXIT_DEBUG, pc=kvm_get_linear_rip(vcpu), exception=vector, **registers)
    return 0


def _guest_inject_ac(vcpu: Vcpu) -> bool:
    """#AC is the guest's, unless the host's split-lock detection may have raised it.

    KVM: vmx_guest_inject_ac.
    """
    if not vcpu.options.host_split_lock_detect:
        return True
    return bool(
        vmx_get_cpl(vcpu) == 3
        and kvm_read_cr0_bits(vcpu, X86_CR0_AM)
        and kvm_get_rflags(vcpu) & X86_EFLAGS_AC
    )
