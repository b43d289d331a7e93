"""Exits that end in the emulator because of memory: EPT, the APIC page, descriptor tables.

KVM: handle_ept_violation, handle_ept_misconfig, handle_apic_access, handle_desc,
kvm_mmu_page_fault (its end), kvm_handle_page_fault.
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.io_bus import KVM_FAST_MMIO_BUS
from emufuzz.kvm.lapic import kvm_lapic_set_eoi
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.mmu.page_fault import kvm_mmu_page_fault
from emufuzz.kvm.mmu.tdp import EPT_MISCONFIG_ERROR_CODE, ept_violation_error_code
from emufuzz.kvm.regs import kvm_rip_read, vmx_get_exit_qual
from emufuzz.kvm.vcpu import Vcpu
from emufuzz.kvm.vmx_bits import GUEST_INTR_STATE_NMI, INTR_INFO_UNBLOCK_NMI, INTR_INFO_VALID_MASK
from emufuzz.kvm.vmx_check import vmx_check_emulate_instruction
from emufuzz.kvm.x86 import x86_emulate_instruction

_APIC_OFFSET: Final = 0xFFF
_APIC_ACCESS_TYPE: Final = 0xF << 12
_LINEAR_WRITE: Final = 1 << 12
_APIC_EOI: Final = 0xB0


def block_nmi_again(vcpu: Vcpu) -> None:
    """IRET had unblocked NMIs when it exited: block them until it has run (SDM Vol. 3C 27.2.3)."""
    vectoring = vcpu.vmcs.values[vf.IDT_VECTORING_INFO_FIELD] & INTR_INFO_VALID_MASK
    if not vectoring and vcpu.options.vnmi and vmx_get_exit_qual(vcpu) & INTR_INFO_UNBLOCK_NMI:
        vcpu.vmcs.set_bits(vf.GUEST_INTERRUPTIBILITY_INFO, GUEST_INTR_STATE_NMI)


def emulate_page_fault(machine: KvmMachine, cr2_or_gpa: int, error_code: int) -> int:
    """Let the MMU handle a fault, and emulate if it says so."""
    result = kvm_mmu_page_fault(machine.mmu, cr2_or_gpa, error_code)
    if not result.emulate:
        return 1
    return x86_emulate_instruction(machine, cr2_or_gpa, result.emulation_type)


def kvm_handle_page_fault(machine: KvmMachine, error_code: int, fault_address: int) -> int:
    """#PF with shadow paging."""
    _trace_page_fault(machine.vcpu, fault_address, error_code)
    return emulate_page_fault(machine, fault_address, error_code)


def _trace_page_fault(vcpu: Vcpu, address: int, error_code: int) -> None:
    if vcpu.trace is not None:
        vcpu.trace.emit(
            "kvm_page_fault", guest_rip=kvm_rip_read(vcpu), fault_address=address, error_code=error_code
        )


def handle_ept_violation(machine: KvmMachine) -> int:
    """Exit 48. A physical address that the guest's processor would not have is a fault of the guest's."""
    vcpu = machine.vcpu
    qualification = vmx_get_exit_qual(vcpu)
    block_nmi_again(vcpu)
    gpa = vcpu.vmcs.values[vf.GUEST_PHYSICAL_ADDRESS]
    _trace_page_fault(vcpu, gpa, qualification)
    if vcpu.options.allow_smaller_maxphyaddr and gpa & vcpu.cpuid.reserved_gpa_bits:
        return machine.emulate(0)
    return emulate_page_fault(machine, gpa, ept_violation_error_code(qualification))


def handle_ept_misconfig(machine: KvmMachine) -> int:
    """Exit 49: an access to a device that KVM has seen before; a mere notification needs no emulator."""
    vcpu = machine.vcpu
    if not vmx_check_emulate_instruction(vcpu):
        return 1
    gpa = vcpu.vmcs.values[vf.GUEST_PHYSICAL_ADDRESS]
    if vcpu.guest_mode is None and machine.buses.write(KVM_FAST_MMIO_BUS, gpa, b""):
        if vcpu.trace is not None:
            vcpu.trace.emit("kvm_fast_mmio", gpa=gpa)
        machine.fast_mmio += 1
        return kvm_skip_emulated_instruction(vcpu)
    return emulate_page_fault(machine, gpa, EPT_MISCONFIG_ERROR_CODE)


def handle_apic_access(machine: KvmMachine) -> int:
    """Exit 44. KVM deviation: a linear write to EOI is taken for a MOV of any value (SDM Vol. 3A 10.8.5)."""
    vcpu = machine.vcpu
    if vcpu.options.fasteoi and vcpu.apic is not None:
        qualification = vmx_get_exit_qual(vcpu)
        if qualification & _APIC_ACCESS_TYPE == _LINEAR_WRITE and qualification & _APIC_OFFSET == _APIC_EOI:
            kvm_lapic_set_eoi(vcpu)
            return kvm_skip_emulated_instruction(vcpu)
    return machine.emulate(0)


def handle_desc(machine: KvmMachine) -> int:
    """Exits 46 and 47, which stand in for a processor without UMIP."""
    return machine.emulate(0)
