"""System-management mode: entering it on an SMI, and leaving it by RSM.

KVM: enter_smm, emulator_leave_smm, rsm_load_state_64, rsm_load_state_32, rsm_enter_protected_mode,
kvm_smm_changed. SDM Vol. 3C chapter 32 "System Management Mode".

What nested virtualization suspends during SMM is not modelled (vmx_enter_smm, vmx_leave_smm).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from emufuzz.arch import cr as crs
from emufuzz.arch.regs import (
    VCPU_SREG_CS,
    VCPU_SREG_DS,
    VCPU_SREG_ES,
    VCPU_SREG_FS,
    VCPU_SREG_GS,
    VCPU_SREG_LDTR,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.arch.rflags import X86_EFLAGS_FIXED
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_write
from emufuzz.emulator.x86emul import X86EMUL_CONTINUE, X86EMUL_UNHANDLEABLE
from emufuzz.kvm import smram as sm
from emufuzz.kvm.cr import (
    X86_CR3_PCID_MASK,
    kvm_set_cr0,
    kvm_set_cr3,
    kvm_set_cr4,
    kvm_update_cpuid_runtime,
    vmx_set_cr0,
    vmx_set_cr4,
    vmx_set_efer,
)
from emufuzz.kvm.debugregs import DR7_FIXED_1, kvm_set_dr
from emufuzz.kvm.guest_state import vmx_set_segment
from emufuzz.kvm.interruptibility import vmx_get_interrupt_shadow, vmx_set_interrupt_shadow
from emufuzz.kvm.lapic_irq import emit
from emufuzz.kvm.msr import kvm_set_msr
from emufuzz.kvm.msr_index import MSR_EFER
from emufuzz.kvm.nmi import vmx_get_nmi_mask, vmx_set_nmi_mask
from emufuzz.kvm.regs import (
    kvm_read_cr0,
    kvm_read_cr3,
    kvm_read_cr4,
    kvm_register_read_raw,
    kvm_rip_read,
    kvm_rip_write,
)
from emufuzz.kvm.rflags import kvm_get_rflags, kvm_set_rflags
from emufuzz.kvm.rmode import vmx_update_exception_bitmap
from emufuzz.kvm.segments import (
    vmx_get_gdt,
    vmx_get_idt,
    vmx_get_segment,
    vmx_set_gdt,
    vmx_set_idt,
)
from emufuzz.kvm.vcpu import KVM_REQ_EVENT, KvmSegment, Vcpu

#: Guest-physical memory (address, bytes), also across pages; None where there is none.
ReadGuest = Callable[[int, int], bytes | None]

_MASK32: Final = 0xFFFFFFFF
_DATA: Final = (VCPU_SREG_DS, VCPU_SREG_ES, VCPU_SREG_FS, VCPU_SREG_GS, VCPU_SREG_SS)
_SEGMENTS: Final = (VCPU_SREG_ES, VCPU_SREG_CS, VCPU_SREG_SS, VCPU_SREG_DS, VCPU_SREG_FS, VCPU_SREG_GS)
_REVISION_64: Final = 0x00020064
_REVISION_32: Final = 0x00020000
_SMM_ENTRY_POINT: Final = 0x8000


def kvm_smm_changed(vcpu: Vcpu, *, entering: bool) -> None:
    """The vCPU enters or leaves SMM; the MMU starts over, as SMM may have memory of its own."""
    emit(vcpu, "kvm_smm_transition", smbase=vcpu.smbase, entering=entering)
    vcpu.smm = entering
    if not entering:
        vcpu.smm_inside_nmi = False
        vcpu.make_request(KVM_REQ_EVENT)
    vcpu.hooks.mmu_reset_context()


# -- RSM ---------------------------------------------------------------------------------------


def emulator_leave_smm(ctxt: X86EmulateCtxt, vcpu: Vcpu, read_guest: ReadGuest) -> int:
    """RSM: load the saved state; GPRs, RIP, RFLAGS and the interrupt shadow go to the emulator.

    Args:
        ctxt: the emulation of RSM.
        vcpu: its vCPU, in SMM.
        read_guest: reads the state-save area, which may cross a page.

    Returns:
        X86EMUL_CONTINUE, or X86EMUL_UNHANDLEABLE for a state that cannot be loaded: the processor shuts
        down, with what was loaded until then.

    KVM deviation: an unreadable area leaves the vCPU in SMM; reserved bits of CR0 and flags are not
    looked at, and the descriptor caches are loaded unchecked (SDM Vol. 3C 32.8).
    """
    data = read_guest(vcpu.smbase + sm.SMRAM_OFFSET, sm.SMRAM_SIZE)
    if data is None:
        return X86EMUL_UNHANDLEABLE
    smram = sm.Smram(data)
    if not vcpu.smm_inside_nmi:
        vmx_set_nmi_mask(vcpu, masked=False)
    kvm_smm_changed(vcpu, entering=False)
    _back_to_real_mode(vcpu)
    load = _rsm_load_state_64 if vcpu.cpuid.has("lm") else _rsm_load_state_32
    ret = X86EMUL_CONTINUE if load(ctxt, vcpu, smram) else X86EMUL_UNHANDLEABLE
    if ret != X86EMUL_CONTINUE and vcpu.guest_mode is not None:
        # KVM: kvm_leave_nested, so that L1 shuts down instead of seeing an exit of L2
        vcpu.guest_mode = None
        vmx_update_exception_bitmap(vcpu)
    return ret


def _back_to_real_mode(vcpu: Vcpu) -> None:
    """A state in which any CR0, CR3, CR4 and EFER can be loaded; nothing is checked on the way."""
    long_mode = vcpu.cpuid.has("lm")
    if long_mode:
        cr4 = kvm_read_cr4(vcpu)
        if cr4 & crs.X86_CR4_PCIDE:
            kvm_set_cr4(vcpu, cr4 & ~crs.X86_CR4_PCIDE)
        # paging cannot be turned off in 64-bit code
        vmx_set_segment(vcpu, KvmSegment(type=0xB, s=1, g=1, present=1), VCPU_SREG_CS)
    cr0 = kvm_read_cr0(vcpu)
    if cr0 & crs.X86_CR0_PE:
        kvm_set_cr0(vcpu, cr0 & ~(crs.X86_CR0_PG | crs.X86_CR0_PE))
    if long_mode:
        cr4 = kvm_read_cr4(vcpu)
        if cr4 & crs.X86_CR4_PAE:
            kvm_set_cr4(vcpu, cr4 & ~crs.X86_CR4_PAE)
        kvm_set_msr(vcpu, MSR_EFER, 0)


def _rsm_load_state_64(ctxt: X86EmulateCtxt, vcpu: Vcpu, smram: sm.Smram) -> bool:
    for reg in range(16):
        reg_write(ctxt, reg, smram.get(sm.GPRS_64 + 8 * (15 - reg), 8))
    ctxt.next_eip = smram.get(sm.RIP_64, 8)
    ctxt.eflags = smram.get(sm.RFLAGS_64, 8) | X86_EFLAGS_FIXED
    if kvm_set_dr(vcpu, 6, smram.get(sm.DR6_64, 8)) or kvm_set_dr(vcpu, 7, smram.get(sm.DR7_64, 8)):
        return False
    vcpu.smbase = smram.get(sm.SMBASE_64, 4)
    if kvm_set_msr(vcpu, MSR_EFER, smram.get(sm.EFER_64, 8) & ~crs.EFER_LMA):
        return False
    vmx_set_segment(vcpu, smram.segment_64(VCPU_SREG_TR), VCPU_SREG_TR)
    vmx_set_idt(vcpu, *smram.table_64(sm.IDTR_64))
    vmx_set_segment(vcpu, smram.segment_64(VCPU_SREG_LDTR), VCPU_SREG_LDTR)
    vmx_set_gdt(vcpu, *smram.table_64(sm.GDTR_64))
    registers = (smram.get(offset, 8) for offset in (sm.CR0_64, sm.CR3_64, sm.CR4_64))
    if not _rsm_enter_protected_mode(vcpu, *registers):
        return False
    for seg in _SEGMENTS:
        vmx_set_segment(vcpu, smram.segment_64(seg), seg)
    vmx_set_interrupt_shadow(vcpu, 0)
    ctxt.interruptibility = smram.get(sm.INT_SHADOW_64, 1)
    return True


def _rsm_load_state_32(ctxt: X86EmulateCtxt, vcpu: Vcpu, smram: sm.Smram) -> bool:
    ctxt.eflags = smram.get(sm.EFLAGS_32, 4) | X86_EFLAGS_FIXED
    ctxt.next_eip = smram.get(sm.EIP_32, 4)
    for reg in range(8):
        reg_write(ctxt, reg, smram.get(sm.GPRS_32 + 4 * reg, 4))
    kvm_set_dr(vcpu, 6, smram.get(sm.DR6_32, 4))  # 32 bits cannot be refused
    kvm_set_dr(vcpu, 7, smram.get(sm.DR7_32, 4))
    for seg in (VCPU_SREG_TR, VCPU_SREG_LDTR):
        vmx_set_segment(vcpu, smram.segment_32(seg), seg)
    vmx_set_gdt(vcpu, *smram.table_32(sm.GDTR_32))
    vmx_set_idt(vcpu, *smram.table_32(sm.IDTR_32))
    for seg in _SEGMENTS:
        vmx_set_segment(vcpu, smram.segment_32(seg), seg)
    vcpu.smbase = smram.get(sm.SMBASE_32, 4)
    registers = (smram.get(offset, 4) for offset in (sm.CR0_32, sm.CR3_32, sm.CR4_32))
    if not _rsm_enter_protected_mode(vcpu, *registers):
        return False
    vmx_set_interrupt_shadow(vcpu, 0)
    ctxt.interruptibility = smram.get(sm.INT_SHADOW_32, 1)
    return True


def _rsm_enter_protected_mode(vcpu: Vcpu, cr0: int, cr3: int, cr4: int) -> bool:
    """Load CR3, CR4, CR0; PCIDs come last, as they need long mode and are set while CR3's is 0."""
    pcide = cr4 & crs.X86_CR4_PCIDE
    pcid = cr3 & X86_CR3_PCID_MASK if pcide else 0
    if kvm_set_cr3(vcpu, cr3 - pcid) or kvm_set_cr4(vcpu, cr4 - pcide) or kvm_set_cr0(vcpu, cr0):
        return False
    if pcide:
        if kvm_set_cr4(vcpu, cr4) or (pcid and kvm_set_cr3(vcpu, cr3)):
            return False
    return True


# -- SMI ---------------------------------------------------------------------------------------


def enter_smm(vcpu: Vcpu) -> bool:
    """An SMI: save the state at SMBASE + FE00h, go on at SMBASE + 8000h in a large-limit real mode.

    Returns:
        False if the state cannot be saved, which ends the machine.
    """
    smram = sm.Smram()
    if vcpu.cpuid.has("lm"):
        _save_state_64(vcpu, smram)
    else:
        _save_state_32(vcpu, smram)
    kvm_smm_changed(vcpu, entering=True)
    if not vcpu.hooks.write_phys(vcpu.smbase + sm.SMRAM_OFFSET, bytes(smram.data)):
        return False
    if vmx_get_nmi_mask(vcpu):
        vcpu.smm_inside_nmi = True
    else:
        vmx_set_nmi_mask(vcpu, masked=True)
    _load_smm_state(vcpu)
    kvm_update_cpuid_runtime(vcpu)
    vcpu.hooks.mmu_reset_context()
    return True


def _load_smm_state(vcpu: Vcpu) -> None:
    """SDM Vol. 3C Table 32-4; the IDT's limit is 0, as on real processors."""
    kvm_set_rflags(vcpu, X86_EFLAGS_FIXED)
    kvm_rip_write(vcpu, _SMM_ENTRY_POINT)
    vmx_set_interrupt_shadow(vcpu, 0)
    off = crs.X86_CR0_PE | crs.X86_CR0_EM | crs.X86_CR0_TS | crs.X86_CR0_PG
    vmx_set_cr0(vcpu, vcpu.cr0 & ~off)
    vmx_set_cr4(vcpu, 0)
    vmx_set_idt(vcpu, 0, 0)
    kvm_set_dr(vcpu, 7, DR7_FIXED_1)
    flat = KvmSegment(limit=_MASK32, type=3, s=1, g=1, present=1)
    code = flat.copy()
    code.selector, code.base = vcpu.smbase >> 4 & 0xFFFF, vcpu.smbase
    vmx_set_segment(vcpu, code, VCPU_SREG_CS)
    for seg in _DATA:
        vmx_set_segment(vcpu, flat.copy(), seg)
    if vcpu.cpuid.has("lm"):
        vmx_set_efer(vcpu, 0)


def _save_state_64(vcpu: Vcpu, smram: sm.Smram) -> None:
    for reg in range(16):
        smram.put(sm.GPRS_64 + 8 * (15 - reg), 8, kvm_register_read_raw(vcpu, reg))
    for offset, value in (
        (sm.RIP_64, kvm_rip_read(vcpu)),
        (sm.RFLAGS_64, kvm_get_rflags(vcpu)),
        (sm.DR6_64, vcpu.dr6),
        (sm.DR7_64, vcpu.dr7),
        (sm.CR0_64, kvm_read_cr0(vcpu)),
        (sm.CR3_64, kvm_read_cr3(vcpu)),
        (sm.CR4_64, kvm_read_cr4(vcpu)),
        (sm.EFER_64, vcpu.efer),
    ):
        smram.put(offset, 8, value)
    smram.put(sm.SMBASE_64, 4, vcpu.smbase)
    smram.put(sm.REVISION_64, 4, _REVISION_64)
    smram.put_table_64(sm.GDTR_64, *vmx_get_gdt(vcpu))
    smram.put_table_64(sm.IDTR_64, *vmx_get_idt(vcpu))
    for seg in (*_SEGMENTS, VCPU_SREG_TR, VCPU_SREG_LDTR):
        smram.put_segment_64(seg, vmx_get_segment(vcpu, seg))
    smram.put(sm.INT_SHADOW_64, 1, vmx_get_interrupt_shadow(vcpu))


def _save_state_32(vcpu: Vcpu, smram: sm.Smram) -> None:
    for reg in range(8):
        smram.put(sm.GPRS_32 + 4 * reg, 4, kvm_register_read_raw(vcpu, reg))
    for offset, value in (
        (sm.EIP_32, kvm_rip_read(vcpu)),
        (sm.EFLAGS_32, kvm_get_rflags(vcpu)),
        (sm.DR6_32, vcpu.dr6),
        (sm.DR7_32, vcpu.dr7),
        (sm.CR0_32, kvm_read_cr0(vcpu)),
        (sm.CR3_32, kvm_read_cr3(vcpu)),
        (sm.CR4_32, kvm_read_cr4(vcpu)),
        (sm.SMBASE_32, vcpu.smbase),
        (sm.REVISION_32, _REVISION_32),
    ):
        smram.put(offset, 4, value)
    smram.put_table_32(sm.GDTR_32, *vmx_get_gdt(vcpu))
    smram.put_table_32(sm.IDTR_32, *vmx_get_idt(vcpu))
    for seg in (*_SEGMENTS, VCPU_SREG_TR, VCPU_SREG_LDTR):
        smram.put_segment_32(seg, vmx_get_segment(vcpu, seg))
    smram.put(sm.INT_SHADOW_32, 1, vmx_get_interrupt_shadow(vcpu))
