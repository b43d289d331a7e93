"""What an exit reported (KVM: vmx_get_exit_info; SDM Vol. 3C 24.9 "VM-Exit Information Fields")."""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.regs import vmx_get_exit_qual, vmx_get_intr_info
from emufuzz.kvm.vcpu import Vcpu
from emufuzz.kvm.vmx_bits import INTR_INFO_DELIVER_CODE_MASK, INTR_INFO_VALID_MASK

FAILED_VMENTRY: Final = 1 << 31

_ERROR_CODE: Final = INTR_INFO_VALID_MASK | INTR_INFO_DELIVER_CODE_MASK


def vmx_get_exit_info(vcpu: Vcpu) -> tuple[int, int, int, int, int]:
    """(full exit reason, qualification, vectoring information, interruption information, error code)."""
    qualification = vmx_get_exit_qual(vcpu)
    if vcpu.exit_reason & FAILED_VMENTRY:
        return vcpu.exit_reason, qualification, 0, 0, 0
    values = vcpu.vmcs.values
    intr_info = vmx_get_intr_info(vcpu)
    error_code = 0
    if intr_info & _ERROR_CODE == _ERROR_CODE:
        error_code = values[vf.VM_EXIT_INTR_ERROR_CODE]
    return vcpu.exit_reason, qualification, values[vf.IDT_VECTORING_INFO_FIELD], intr_info, error_code
