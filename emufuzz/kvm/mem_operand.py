"""The memory operand of an instruction that exited, from what hardware says of it.

KVM: get_vmx_mem_address. SDM Vol. 3C 27.2.5 "Information for VM Exits Due to Instruction Execution",
Table 27-9 "Format of the VM-Exit Instruction-Information Field".
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import GP_VECTOR, SS_VECTOR, UD_VECTOR
from emufuzz.arch.regs import (
    VCPU_REGS_RSP,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_SS,
)
from emufuzz.kvm.address import is_noncanonical_address, vmx_get_untagged_addr
from emufuzz.kvm.exceptions import kvm_queue_exception, kvm_queue_exception_e
from emufuzz.kvm.regs import is_long_mode, kvm_rsp_read
from emufuzz.kvm.segments import is_64_bit_mode, vmx_get_segment
from emufuzz.kvm.vcpu import KvmSegment, Vcpu

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_ADDRESS_MASK: Final = {0: 0xFFFF, 1: _MASK32, 2: _MASK64}
_REGISTER: Final = 1 << 10
_NO_INDEX: Final = 1 << 22
_NO_BASE: Final = 1 << 27


def _register(vcpu: Vcpu, reg: int) -> int:
    value = kvm_rsp_read(vcpu) if reg == VCPU_REGS_RSP else vcpu.regs[reg]
    return value if is_64_bit_mode(vcpu) else value & _MASK32


def _offset(vcpu: Vcpu, displacement: int, info: int) -> int:
    """Base + index * scale + displacement, cut to the address size.

    A displacement narrower than 64 bits need not be extended first: the cut takes that away.
    """
    offset = displacement
    if not info & _NO_BASE:
        offset += _register(vcpu, info >> 23 & 15)
    if not info & _NO_INDEX:
        offset += _register(vcpu, info >> 18 & 15) << (info & 3)
    return offset & _ADDRESS_MASK.get(info >> 7 & 7, _MASK64)


def get_vmx_mem_address(vcpu: Vcpu, displacement: int, info: int, size: int, *, write: bool) -> int | None:
    """The linear address of the operand, None if #UD, #GP or #SS is queued.

    Args:
        vcpu: The vCPU.
        displacement: The exit qualification.
        info: The VM-exit instruction-information field.
        size: Bytes of the operand.
        write: The operand is written.
    """
    if info & _REGISTER:
        kvm_queue_exception(vcpu, UD_VECTOR)
        return None
    seg = info >> 15 & 7
    offset = _offset(vcpu, displacement, info)
    if is_long_mode(vcpu):
        return _long_mode(vcpu, seg, offset)
    var = vmx_get_segment(vcpu, seg)
    refused = _refuses_write(var) if write else var.type & 10 == 8
    if refused:
        kvm_queue_exception_e(vcpu, GP_VECTOR, 0)
        return None
    if var.unusable or _beyond_limit(var, offset, size):
        kvm_queue_exception_e(vcpu, SS_VECTOR if seg == VCPU_SREG_SS else GP_VECTOR, 0)
        return None
    return var.base + offset & _MASK32


def _refuses_write(var: KvmSegment) -> bool:
    return not var.type & 10 or bool(var.type & 8)


def _beyond_limit(var: KvmSegment, offset: int, size: int) -> bool:
    """Flat segments are not looked at; an expand-down one is checked as if it grew upwards.

    KVM deviation: the limit of an expand-down segment is its upper end here (SDM Vol. 3A 5.3).
    """
    flat = not var.base and var.limit == _MASK32 and (var.type & 8 or not var.type & 4)
    return not flat and offset + size - 1 > var.limit


def _long_mode(vcpu: Vcpu, seg: int, offset: int) -> int | None:
    """KVM deviation: in compatibility mode too only FS and GS have a base, and no limit is checked.

    SDM Vol. 3A 5.3.1.
    """
    base = vmx_get_segment(vcpu, seg).base if seg in (VCPU_SREG_FS, VCPU_SREG_GS) else 0
    address = vmx_get_untagged_addr(vcpu, base + offset & _MASK64, 0)
    if is_noncanonical_address(vcpu, address):
        kvm_queue_exception_e(vcpu, SS_VECTOR if seg == VCPU_SREG_SS else GP_VECTOR, 0)
        return None
    return address
