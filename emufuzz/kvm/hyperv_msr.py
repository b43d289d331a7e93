"""Hyper-V's MSRs, as far as they enable hypercalls, stand for APIC registers or only hold a value.

KVM: kvm_hv_set_msr_common, kvm_hv_get_msr_common, kvm_hv_set_msr_pw, kvm_hv_set_msr. TLFS Appendix C.

Synthetic interrupts and timers, the reference TSC page, assist pages, frequencies, and the debugger's
data are not modelled: their MSRs answer 1 (#GP), as they do where userspace has not set them up.
"""

from __future__ import annotations

from typing import Final

from emufuzz.kvm import hyperv_regs as hv
from emufuzz.kvm.hyperv import hyperv_enabled, kvm_hv_is_syndbg_enabled
from emufuzz.kvm.lapic import kvm_lapic_msr_read, kvm_lapic_msr_write
from emufuzz.kvm.lapic_regs import APIC_EOI, APIC_ICR, APIC_TASKPRI
from emufuzz.kvm.vcpu import Vcpu

#: A guest has asked for its reset, or reported its crash; userspace is told.
KVM_REQ_HV_RESET: Final = "HV_RESET"
KVM_REQ_HV_CRASH: Final = "HV_CRASH"

_HYPERCALL_PAGE: Final = b"\x0f\x01\xc1\xc3"  # vmcall; ret
_PAGE_MASK: Final = 0xFFF
_CRASH_CTL: Final = hv.HV_X64_MSR_CRASH[-1]
_CRASH_NOTIFY: Final = 1 << 63
_EXPOSE_INVARIANT_TSC: Final = 1

_APIC: Final = {
    hv.HV_X64_MSR_EOI: APIC_EOI,
    hv.HV_X64_MSR_ICR: APIC_ICR,
    hv.HV_X64_MSR_TPR: APIC_TASKPRI,
}
#: MSRs that hold what was stored.
_STORED: Final = frozenset({
    *hv.HV_X64_MSR_CRASH[:-1], hv.HV_X64_MSR_REENLIGHTENMENT_CONTROL, hv.HV_X64_MSR_TSC_EMULATION_CONTROL,
    hv.HV_X64_MSR_TSC_EMULATION_STATUS, hv.HV_X64_MSR_TSC_INVARIANT_CONTROL,
})  # fmt: skip
#: MSRs that read as 0: the only virtual processor, a reset that is not going on, time that stands still.
_ZEROS: Final = frozenset({hv.HV_X64_MSR_VP_INDEX, hv.HV_X64_MSR_RESET, hv.HV_X64_MSR_TIME_REF_COUNT})


def kvm_hv_get_msr_common(vcpu: Vcpu, index: int, *, host: bool) -> tuple[int, int]:
    """(0, value), or (1, 0) for #GP."""
    state = vcpu.hyperv
    if not host and not hyperv_enabled(vcpu):
        return 1, 0
    if index == hv.HV_X64_MSR_GUEST_OS_ID:
        return 0, state.guest_os_id
    if index == hv.HV_X64_MSR_HYPERCALL:
        return 0, state.hypercall
    if index in _ZEROS:
        return 0, 0
    if index in _STORED or index == _CRASH_CTL:
        return 0, state.msrs.get(index, 0)
    if index in _APIC and vcpu.apic is not None:
        return kvm_lapic_msr_read(vcpu, _APIC[index])
    if index == hv.HV_X64_MSR_SYNDBG_OPTIONS and (host or kvm_hv_is_syndbg_enabled(vcpu)):
        return 0, state.syndbg_options
    return 1, 0


def kvm_hv_set_msr_common(vcpu: Vcpu, index: int, data: int, *, host: bool) -> int:
    """0, or 1 for #GP."""
    if not host and not hyperv_enabled(vcpu):
        return 1
    if index == hv.HV_X64_MSR_GUEST_OS_ID:
        return _set_guest_os_id(vcpu, data)
    if index == hv.HV_X64_MSR_HYPERCALL:
        return _set_hypercall(vcpu, data)
    if index in _STORED:
        return _store(vcpu, index, data, host=host)
    if index == _CRASH_CTL:
        return _set_crash_ctl(vcpu, data, host=host)
    if index == hv.HV_X64_MSR_RESET:
        if data == 1:
            vcpu.make_request(KVM_REQ_HV_RESET)
        return 0
    if index == hv.HV_X64_MSR_TIME_REF_COUNT:
        return int(not host)
    if index == hv.HV_X64_MSR_VP_INDEX:
        return int(not host or data & 0xFFFFFFFF != 0)
    if index in _APIC and vcpu.apic is not None:
        return kvm_lapic_msr_write(vcpu, _APIC[index], data)
    if index == hv.HV_X64_MSR_SYNDBG_OPTIONS and (host or kvm_hv_is_syndbg_enabled(vcpu)):
        vcpu.hyperv.syndbg_options = data
        return 0
    return 1


def _set_guest_os_id(vcpu: Vcpu, data: int) -> int:
    """Who the guest is; without that there is no hypercall page."""
    vcpu.hyperv.guest_os_id = data
    if not data:
        vcpu.hyperv.hypercall &= ~hv.HV_X64_MSR_HYPERCALL_ENABLE
    return 0


def _set_hypercall(vcpu: Vcpu, data: int) -> int:
    """Enable the hypercall page, which gets its code at once; ignored without a guest OS ID."""
    if not vcpu.hyperv.guest_os_id:
        return 0
    if data & hv.HV_X64_MSR_HYPERCALL_ENABLE:
        if not vcpu.hooks.write_phys(data & ~_PAGE_MASK, _HYPERCALL_PAGE):
            return 1
    vcpu.hyperv.hypercall = data
    return 0


def _store(vcpu: Vcpu, index: int, data: int, *, host: bool) -> int:
    if index == hv.HV_X64_MSR_TSC_EMULATION_STATUS and data and not host:
        return 1
    if index == hv.HV_X64_MSR_TSC_INVARIANT_CONTROL:
        withdrawn = not host and vcpu.hyperv.msrs.get(index, 0) and not data
        if data & ~_EXPOSE_INVARIANT_TSC or withdrawn:
            return 1
    vcpu.hyperv.msrs[index] = data
    return 0


def _set_crash_ctl(vcpu: Vcpu, data: int, *, host: bool) -> int:
    """The guest notifies userspace of its crash, and only what userspace writes is stored."""
    if host:
        vcpu.hyperv.msrs[_CRASH_CTL] = data & _CRASH_NOTIFY
    elif data & _CRASH_NOTIFY:
        vcpu.make_request(KVM_REQ_HV_CRASH)
    return 0
