"""Real mode without unrestricted guest: hardware runs virtual-8086 mode in its place.

KVM: enter_rmode, enter_pmode, fix_pmode_seg, vmx_update_exception_bitmap, vmx_need_pf_intercept.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.arch import exceptions as ex
from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.arch.rflags import X86_EFLAGS_IOPL, X86_EFLAGS_VM
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm.rflags import KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_USE_SW_BP
from emufuzz.kvm.rflags_read import merge_rmode_rflags
from emufuzz.kvm.segments import fix_rmode_seg, set_segment_raw, vmx_get_segment, vmx_segment_cache_clear
from emufuzz.kvm.vcpu import KvmSegment, Vcpu

#: TSS, 32 bytes of interrupt redirection, I/O bitmap and its end byte.
RMODE_TSS_SIZE: Final = 0x68 + 256 // 8 + 65536 // 8 + 1

_SAVED: Final = (VCPU_SREG_ES, VCPU_SREG_DS, VCPU_SREG_FS, VCPU_SREG_GS, VCPU_SREG_SS, VCPU_SREG_CS)
_TR_BUSY_32: Final = 0x8B
_RPL: Final = 3

_ALWAYS_INTERCEPTED: Final = (
    1 << ex.PF_VECTOR | 1 << ex.UD_VECTOR | 1 << ex.MC_VECTOR | 1 << ex.DB_VECTOR | 1 << ex.AC_VECTOR
)


def enter_rmode(vcpu: Vcpu) -> None:
    """CR0.PE was cleared: keep the guest's TR, flags and segments, run it in virtual-8086 mode."""
    rmode, vmcs = vcpu.rmode, vcpu.vmcs
    for seg in (VCPU_SREG_TR, *_SAVED):
        rmode.segs[seg] = vmx_get_segment(vcpu, seg)
    rmode.vm86_active = True
    vmx_segment_cache_clear(vcpu)
    vmcs.write(vf.GUEST_TR_BASE, vcpu.options.tss_addr)
    vmcs.write(vf.GUEST_TR_LIMIT, RMODE_TSS_SIZE - 1)
    vmcs.write(vf.GUEST_TR_AR_BYTES, _TR_BUSY_32)
    rmode.save_rflags = vmcs.read(vf.GUEST_RFLAGS)
    vmcs.set_bits(vf.GUEST_RFLAGS, X86_EFLAGS_IOPL | X86_EFLAGS_VM)
    vmcs.set_bits(vf.GUEST_CR4, crs.X86_CR4_VME)
    vmx_update_exception_bitmap(vcpu)
    for seg in _SAVED:
        fix_rmode_seg(vcpu, seg, rmode.segs[seg])


def enter_pmode(vcpu: Vcpu) -> None:
    """CR0.PE was set: the guest's own TR, flags and segments go back to hardware."""
    rmode, vmcs = vcpu.rmode, vcpu.vmcs
    for seg in _SAVED:
        rmode.segs[seg] = vmx_get_segment(vcpu, seg)
    rmode.vm86_active = False
    set_segment_raw(vcpu, rmode.segs[VCPU_SREG_TR], VCPU_SREG_TR)
    vmcs.write(vf.GUEST_RFLAGS, merge_rmode_rflags(vcpu, vmcs.read(vf.GUEST_RFLAGS)))
    cr4 = vmcs.read(vf.GUEST_CR4) & ~crs.X86_CR4_VME
    vmcs.write(vf.GUEST_CR4, cr4 | vmcs.read(vf.CR4_READ_SHADOW) & crs.X86_CR4_VME)
    vmx_update_exception_bitmap(vcpu)
    for seg in _SAVED:
        _fix_pmode_seg(vcpu, seg, rmode.segs[seg])


def _fix_pmode_seg(vcpu: Vcpu, seg: int, save: KvmSegment) -> None:
    """Without invalid-state emulation make the segment enterable, at RPL 0 for CS and SS."""
    if not vcpu.options.emulate_invalid_guest_state:
        if seg in (VCPU_SREG_CS, VCPU_SREG_SS):
            save.selector &= ~_RPL
        save.dpl = save.selector & _RPL
        save.s = 1
    set_segment_raw(vcpu, save, seg)


def vmx_need_pf_intercept(vcpu: Vcpu) -> bool:
    """#PF exits: with shadow paging, or to check a guest MAXPHYADDR below the host's."""
    options = vcpu.options
    if not options.ept:
        return True
    return options.allow_smaller_maxphyaddr and vcpu.cpuid.maxphyaddr < options.host_maxphyaddr


def vmx_update_exception_bitmap(vcpu: Vcpu) -> None:
    """Which exceptions exit: all of them while virtual-8086 mode stands in for real mode."""
    bitmap = _ALWAYS_INTERCEPTED
    if vcpu.options.enable_vmware_backdoor:
        bitmap |= 1 << ex.GP_VECTOR
    software_breakpoints = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_USE_SW_BP
    if vcpu.guest_debug & software_breakpoints == software_breakpoints:
        bitmap |= 1 << ex.BP_VECTOR
    if vcpu.rmode.vm86_active:
        bitmap = 0xFFFFFFFF
    if not vmx_need_pf_intercept(vcpu):
        bitmap &= ~(1 << ex.PF_VECTOR)
    if vcpu.guest_mode is not None:
        bitmap |= vcpu.guest_mode.exception_bitmap
    else:
        _set_page_fault_match(vcpu, bitmap)
    vcpu.vmcs.write(vf.EXCEPTION_BITMAP, bitmap)


def _set_page_fault_match(vcpu: Vcpu, bitmap: int) -> None:
    """With EPT only faults on present pages without reserved bits matter (SDM Vol. 3C 25.2)."""
    mask = match = 0
    if vcpu.options.ept and bitmap >> ex.PF_VECTOR & 1:
        mask, match = ex.PFERR_PRESENT | ex.PFERR_RSVD, ex.PFERR_PRESENT
    vcpu.vmcs.write(vf.PAGE_FAULT_ERROR_CODE_MASK, mask)
    vcpu.vmcs.write(vf.PAGE_FAULT_ERROR_CODE_MATCH, match)
