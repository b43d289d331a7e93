"""Hypercalls in Hyper-V's interface: decoding, the calls that KVM does itself, and the way to userspace.

KVM: kvm_hv_hypercall, kvm_hvcall_signal_event, kvm_hv_hypercall_set_result,
kvm_hv_hypercall_complete_userspace. TLFS 3 "Hypercall Interface".

CPUID is not enforced (KVM_CAP_HYPERV_ENFORCE_CPUID), no eventfd is bound to a connection, and an
enlightened VMCS does not exist.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.exceptions import UD_VECTOR
from emufuzz.arch.regs import (
    VCPU_REGS_R8,
    VCPU_REGS_RAX,
    VCPU_REGS_RBX,
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RDX,
    VCPU_REGS_RSI,
)
from emufuzz.kvm import hyperv_regs as hv
from emufuzz.kvm.exceptions import kvm_queue_exception
from emufuzz.kvm.hyperv_calls import HvHcall, kvm_hv_flush_tlb, kvm_hv_send_ipi
from emufuzz.kvm.interruptibility import kvm_skip_emulated_instruction
from emufuzz.kvm.lapic_irq import emit
from emufuzz.kvm.regs import is_protmode, kvm_register_write_raw
from emufuzz.kvm.segments import is_64_bit_mode, vmx_get_cpl
from emufuzz.kvm.vcpu import Vcpu

KVM_EXIT_HYPERV: Final = "HYPERV"
KVM_EXIT_HYPERV_HCALL: Final = "HCALL"

_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1
_PAGE_MASK: Final = 0xFFF
_CONN_ID_MASK: Final = 0x00FFFFFF
_FLAG_NUMBER: Final = 0xFFFF << 32

_XMM_FAST: Final = frozenset({
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE,
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX,
    hv.HVCALL_SEND_IPI_EX,
})  # fmt: skip
_FLUSH_LISTS: Final = (hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST_EX)
_FLUSH_SPACES: Final = (hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE_EX)
_IPIS: Final = (hv.HVCALL_SEND_IPI, hv.HVCALL_SEND_IPI_EX)
_DEBUG: Final = (
    hv.HVCALL_POST_DEBUG_DATA, hv.HVCALL_RETRIEVE_DEBUG_DATA, hv.HVCALL_RESET_DEBUG_SESSION,
)  # fmt: skip
#: Calls whose form has no variable header.
_NO_VARHEAD: Final = frozenset({
    hv.HVCALL_NOTIFY_LONG_SPIN_WAIT, hv.HVCALL_SIGNAL_EVENT, hv.HVCALL_POST_MESSAGE,
    hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_LIST, hv.HVCALL_FLUSH_VIRTUAL_ADDRESS_SPACE, hv.HVCALL_SEND_IPI,
})  # fmt: skip
#: Calls that are not repeated.
_NO_REP: Final = frozenset({
    hv.HVCALL_NOTIFY_LONG_SPIN_WAIT, hv.HVCALL_SIGNAL_EVENT, hv.HVCALL_POST_MESSAGE, *_FLUSH_SPACES, *_IPIS,
})  # fmt: skip


def hyperv_enabled(vcpu: Vcpu) -> bool:
    """The guest is offered Hyper-V's interface, by the knob `hyperv` or by CPUID."""
    leaf = vcpu.cpuid.find(hv.HYPERV_CPUID_INTERFACE, 0)
    return vcpu.options.hyperv or (leaf is not None and leaf[0] == hv.HYPERV_CPUID_SIGNATURE_EAX)


def kvm_hv_hypercall_enabled(vcpu: Vcpu) -> bool:
    """The guest has said who it is, so its VMCALLs are Hyper-V's."""
    return bool(vcpu.hyperv.guest_os_id) and hyperv_enabled(vcpu)


def kvm_hv_is_syndbg_enabled(vcpu: Vcpu) -> bool:
    """CPUID offers the synthetic debugger."""
    leaf = vcpu.cpuid.find(hv.HYPERV_CPUID_SYNDBG_PLATFORM_CAPABILITIES, 0)
    return leaf is not None and bool(leaf[0] & hv.HV_X64_SYNDBG_CAP_ALLOW_KERNEL_DEBUGGING)


def kvm_hv_hypercall(vcpu: Vcpu) -> int:
    """VMCALL as a hypercall of Hyper-V: 1 to go on in the guest, 0 to leave to userspace.

    #UD above CPL 0 and in real mode. Userspace answers with `run.data["result"]`.
    """
    if vmx_get_cpl(vcpu) or not is_protmode(vcpu):
        kvm_queue_exception(vcpu, UD_VECTOR)
        return 1
    call = _decode(vcpu)
    emit(
        vcpu, "kvm_hv_hypercall", code=call.code, fast=call.fast, var_cnt=call.var_cnt, rep_cnt=call.rep_cnt,
        rep_idx=call.rep_idx, ingpa=call.ingpa, outgpa=call.outgpa,
    )  # fmt: skip
    if call.param & hv.HV_HYPERCALL_RSVD_MASK:
        return _complete(vcpu, hv.HV_STATUS_INVALID_HYPERCALL_INPUT)
    if call.fast and call.code in _XMM_FAST and vcpu.fpu is not None:
        vcpu.fpu.get()
        call.xmm = vcpu.fpu.xmm[: hv.HV_HYPERCALL_MAX_XMM_REGISTERS]
    result = _execute(vcpu, call)
    return _leave(vcpu, call) if result is None else _complete(vcpu, result)


def _decode(vcpu: Vcpu) -> HvHcall:
    """Parameters from RCX, RDX, R8, or outside 64-bit mode from EDX:EAX, EBX:ECX, EDI:ESI."""
    regs = vcpu.regs
    if is_64_bit_mode(vcpu):
        return HvHcall(regs[VCPU_REGS_RCX], regs[VCPU_REGS_RDX], regs[VCPU_REGS_R8])
    pairs = (
        (VCPU_REGS_RDX, VCPU_REGS_RAX), (VCPU_REGS_RBX, VCPU_REGS_RCX), (VCPU_REGS_RDI, VCPU_REGS_RSI),
    )  # fmt: skip
    return HvHcall(*(regs[high] << 32 & _MASK64 | regs[low] & _MASK32 for high, low in pairs))


def _execute(vcpu: Vcpu, call: HvHcall) -> int | None:
    """The call's result; None for what userspace does."""
    code = call.code
    if code in _NO_VARHEAD and call.var_cnt:
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    if code in _NO_REP and call.rep:
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    if code in _FLUSH_LISTS and (not call.rep_cnt or call.rep_idx):
        return hv.HV_STATUS_INVALID_HYPERCALL_INPUT
    if code == hv.HVCALL_NOTIFY_LONG_SPIN_WAIT:
        return hv.HV_STATUS_SUCCESS
    if code in (hv.HVCALL_SIGNAL_EVENT, hv.HVCALL_POST_MESSAGE):
        return _message(vcpu, call)
    if code in _FLUSH_LISTS or code in _FLUSH_SPACES:
        return kvm_hv_flush_tlb(vcpu, call)
    if code in _IPIS:
        return kvm_hv_send_ipi(vcpu, call)
    if code in _DEBUG:
        return _debug(vcpu, call)
    if code in hv.HV_EXT_CALLS:
        return hv.HV_STATUS_INVALID_PARAMETER if call.fast else None
    return hv.HV_STATUS_INVALID_HYPERCALL_CODE


def _message(vcpu: Vcpu, call: HvHcall) -> int | None:
    """An event without a port known to KVM, and any message, is for userspace if that has a SynIC."""
    if call.code == hv.HVCALL_SIGNAL_EVENT:
        result = _signal_event(vcpu, call)
        if result != hv.HV_STATUS_INVALID_PORT_ID:
            return result
    return None if vcpu.options.hyperv_synic else hv.HV_STATUS_INVALID_HYPERCALL_INPUT


def _signal_event(vcpu: Vcpu, call: HvHcall) -> int:
    """Connection and flag number, from memory unless fast; `call.ingpa` becomes what was read there."""
    if not call.fast:
        gpa = call.ingpa
        if gpa & 7 or (gpa & _PAGE_MASK) + 8 > _PAGE_MASK + 1:
            return hv.HV_STATUS_INVALID_ALIGNMENT
        data = vcpu.hooks.read_phys(gpa, 8)
        if data is None:
            return hv.HV_STATUS_INVALID_ALIGNMENT
        call.ingpa = int.from_bytes(data, "little")
    if call.ingpa & _FLAG_NUMBER or not call.ingpa & ~_CONN_ID_MASK:
        return hv.HV_STATUS_INVALID_PORT_ID
    return hv.HV_STATUS_INVALID_HYPERCALL_INPUT


def _debug(vcpu: Vcpu, call: HvHcall) -> int | None:
    if call.fast and call.code != hv.HVCALL_RESET_DEBUG_SESSION:
        return hv.HV_STATUS_INVALID_PARAMETER
    if not kvm_hv_is_syndbg_enabled(vcpu):
        return hv.HV_STATUS_INVALID_HYPERCALL_CODE
    by_hypercall = vcpu.hyperv.syndbg_options & hv.HV_X64_SYNDBG_OPTION_USE_HCALLS
    return None if by_hypercall else hv.HV_STATUS_OPERATION_DENIED


def _leave(vcpu: Vcpu, call: HvHcall) -> int:
    vcpu.run.leave(
        KVM_EXIT_HYPERV,
        type=KVM_EXIT_HYPERV_HCALL,
        input=call.param,
        params=[call.ingpa, call.outgpa],
        result=0,
    )
    vcpu.complete_userspace_io = kvm_hv_hypercall_complete_userspace
    return 0


def kvm_hv_hypercall_complete_userspace(vcpu: Vcpu) -> int:
    """Userspace has done a hypercall: `run.data["result"]` is its result."""
    return _complete(vcpu, vcpu.run.data["result"])


def _complete(vcpu: Vcpu, result: int) -> int:
    """Store the result in RAX or EDX:EAX, and go on (KVM: kvm_hv_hypercall_complete)."""
    emit(vcpu, "kvm_hv_hypercall_done", result=result)
    if is_64_bit_mode(vcpu):
        kvm_register_write_raw(vcpu, VCPU_REGS_RAX, result)
    else:
        kvm_register_write_raw(vcpu, VCPU_REGS_RDX, result >> 32)
        kvm_register_write_raw(vcpu, VCPU_REGS_RAX, result & _MASK32)
    return kvm_skip_emulated_instruction(vcpu)
