"""System instructions (SDM Vol. 2: MOV CR/DR, LMSW, CLTS, INVLPG, HLT, CPUID, XSETBV, VMCALL ...).

emulate.c: em_cr_write .. em_hypercall, check_cr_access, check_dr_read, check_dr_write,
check_svme, check_svme_pa.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_SVME, X86_CR0_TS, X86_CR4_DE, X86_CR4_OSXSAVE
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RBX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.emulator.access import MSR_EFER, emulator_recalc_and_set_mode, linearize
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read, reg_write
from emufuzz.emulator.faults import emulate_db, emulate_gp, emulate_ud
from emufuzz.emulator.insn.segreg import umip_forbids
from emufuzz.emulator.x86emul import (
    MASK32,
    OPERAND_MEM,
    OPERAND_NONE,
    X86EMUL_CONTINUE,
    X86EMUL_F_INVLPG,
    X86EMUL_MODE_PROT64,
)

MSR_MISC_FEATURES_ENABLES: Final = 0x140
_CPUID_FAULT: Final = 1
_VALID_CR: Final = (0, 2, 3, 4, 8)
_DR7_GD: Final = 1 << 13
_DR6_TRAP_BITS: Final = 0xF
_DR6_BD: Final = 1 << 13
_DR6_ACTIVE_LOW: Final = 0xFFFF0FF0


def check_cr_access(ctxt: X86EmulateCtxt) -> int:
    """#UD for a control register that does not exist."""
    return X86EMUL_CONTINUE if ctxt.modrm_reg in _VALID_CR else emulate_ud(ctxt)


def sw_cr_read(ctxt: X86EmulateCtxt) -> int:
    """MOV r, CRn."""
    ctxt.dst.val = ctxt.ops.get_cr(ctxt, ctxt.modrm_reg)
    return X86EMUL_CONTINUE


def em_cr_write(ctxt: X86EmulateCtxt) -> int:
    """MOV CRn, r.

    KVM deviation: bits 63:32 of a value for CR0 and CR4 are dropped, not #GP(0), by the callback
    (SDM Vol. 2B MOV CRn).
    """
    if ctxt.ops.set_cr(ctxt, ctxt.modrm_reg, ctxt.src.val):
        return emulate_gp(ctxt, 0)
    ctxt.dst.type = OPERAND_NONE
    return emulator_recalc_and_set_mode(ctxt) if ctxt.modrm_reg == 0 else X86EMUL_CONTINUE


def check_dr_read(ctxt: X86EmulateCtxt) -> int:
    """#UD for registers that do not exist or DR4/DR5 with CR4.DE; #DB with DR7.GD.

    KVM deviation: DR6.BD is written here, ahead of the injection of #DB (SDM Vol. 3B 18.2.3).
    """
    dr = ctxt.modrm_reg
    ops = ctxt.ops
    if dr > 7 or (dr in (4, 5) and ops.get_cr(ctxt, 4) & X86_CR4_DE):
        return emulate_ud(ctxt)
    if ops.get_dr(ctxt, 7) & _DR7_GD:
        dr6 = ops.get_dr(ctxt, 6) & ~_DR6_TRAP_BITS | _DR6_BD | _DR6_ACTIVE_LOW
        ops.set_dr(ctxt, 6, dr6)
        return emulate_db(ctxt)
    return X86EMUL_CONTINUE


def check_dr_write(ctxt: X86EmulateCtxt) -> int:
    """KVM deviation: #GP(0) for bits 63:32 of DR6 and DR7 comes before #UD and #DB (SDM Vol. 2B MOV DRn)."""
    if ctxt.modrm_reg in (6, 7) and ctxt.src.val >> 32:
        return emulate_gp(ctxt, 0)
    return check_dr_read(ctxt)


def sw_dr_read(ctxt: X86EmulateCtxt) -> int:
    """MOV r, DRn."""
    ctxt.dst.val = ctxt.ops.get_dr(ctxt, ctxt.modrm_reg)
    return X86EMUL_CONTINUE


def em_dr_write(ctxt: X86EmulateCtxt) -> int:
    """MOV DRn, r.

    KVM deviation: the callback refuses with 1 but only negative results are looked at, so a bad
    value for DR4 or DR5 is silently dropped (SDM Vol. 2B MOV DRn).
    """
    value = ctxt.src.val if ctxt.mode == X86EMUL_MODE_PROT64 else ctxt.src.val & MASK32
    if ctxt.ops.set_dr(ctxt, ctxt.modrm_reg, value) < 0:
        return emulate_gp(ctxt, 0)
    ctxt.dst.type = OPERAND_NONE
    return X86EMUL_CONTINUE


def em_smsw(ctxt: X86EmulateCtxt) -> int:
    """SMSW r/m."""
    if umip_forbids(ctxt):
        return emulate_gp(ctxt, 0)
    if ctxt.dst.type == OPERAND_MEM:
        ctxt.dst.bytes = 2
    ctxt.dst.val = ctxt.ops.get_cr(ctxt, 0)
    return X86EMUL_CONTINUE


def em_lmsw(ctxt: X86EmulateCtxt) -> int:
    """LMSW r/m16: the low four bits of CR0, of which PE can only be set.

    KVM deviation: a refused value is ignored, and the mode is not derived anew (SDM Vol. 2A LMSW).
    """
    cr0 = ctxt.ops.get_cr(ctxt, 0)
    ctxt.ops.set_cr(ctxt, 0, cr0 & ~0xE | ctxt.src.val & 0xF)
    ctxt.dst.type = OPERAND_NONE
    return X86EMUL_CONTINUE


def em_clts(ctxt: X86EmulateCtxt) -> int:
    """CLTS.

    KVM deviation: a refused CR0 is ignored (SDM Vol. 2A CLTS).
    """
    ctxt.ops.set_cr(ctxt, 0, ctxt.ops.get_cr(ctxt, 0) & ~X86_CR0_TS)
    return X86EMUL_CONTINUE


def em_invlpg(ctxt: X86EmulateCtxt) -> int:
    """INVLPG m.

    KVM deviation: segmentation faults make it a no-op (SDM Vol. 2A INVLPG).
    """
    la = linearize(ctxt, ctxt.src.seg, ctxt.src.ea, 1, X86EMUL_F_INVLPG)
    if la >= 0:
        ctxt.ops.invlpg(ctxt, la)
    ctxt.dst.type = OPERAND_NONE
    return X86EMUL_CONTINUE


def em_hypercall(ctxt: X86EmulateCtxt) -> int:
    """VMCALL and VMMCALL: patch in what this host's CPU has, and let the guest run it again.

    KVM deviation: the patch goes to RIP as a linear address, whatever the base of CS; VMCALL above
    CPL 0 is #GP(0), not a VM exit (SDM Vol. 3C VMCALL).
    """
    rc = ctxt.ops.fix_hypercall(ctxt)
    if rc == X86EMUL_CONTINUE:
        ctxt.next_eip = ctxt.eip
        ctxt.dst.type = OPERAND_NONE
    return rc


def sw_hlt(ctxt: X86EmulateCtxt) -> int:
    """HLT."""
    ctxt.ops.halt(ctxt)
    return X86EMUL_CONTINUE


def sw_wbinvd(ctxt: X86EmulateCtxt) -> int:
    """WBINVD."""
    ctxt.ops.wbinvd(ctxt)
    return X86EMUL_CONTINUE


def sw_invd(ctxt: X86EmulateCtxt) -> int:  # noqa: ARG001 - the shape of a handler
    """INVD: caches are not modelled, nothing to do."""
    return X86EMUL_CONTINUE


def em_clflush(ctxt: X86EmulateCtxt) -> int:  # noqa: ARG001 - the shape of a handler
    """CLFLUSH m8.

    KVM deviation: the byte was really read, so MMIO sees an access; no CPUID check
    (SDM Vol. 2A CLFLUSH).
    """
    return X86EMUL_CONTINUE


def em_clflushopt(ctxt: X86EmulateCtxt) -> int:  # noqa: ARG001 - the shape of a handler
    """CLFLUSHOPT m8.

    KVM deviation: as CLFLUSH (SDM Vol. 2A CLFLUSHOPT).
    """
    return X86EMUL_CONTINUE


def em_cpuid(ctxt: X86EmulateCtxt) -> int:
    """CPUID; #GP(0) above CPL 0 with CPUID faulting."""
    ops = ctxt.ops
    if ops.get_msr(ctxt, MSR_MISC_FEATURES_ENABLES)[1] & _CPUID_FAULT and ops.cpl(ctxt):
        return emulate_gp(ctxt, 0)
    eax = reg_read(ctxt, VCPU_REGS_RAX) & MASK32
    ecx = reg_read(ctxt, VCPU_REGS_RCX) & MASK32
    _, eax, ebx, ecx, edx = ops.get_cpuid(ctxt, eax, ecx, exact_only=False)
    reg_write(ctxt, VCPU_REGS_RAX, eax)
    reg_write(ctxt, VCPU_REGS_RBX, ebx)
    reg_write(ctxt, VCPU_REGS_RCX, ecx)
    reg_write(ctxt, VCPU_REGS_RDX, edx)
    return X86EMUL_CONTINUE


def em_xsetbv(ctxt: X86EmulateCtxt) -> int:
    """XSETBV.

    KVM deviation: privilege was checked before CR4.OSXSAVE (SDM Vol. 2D XSETBV: #UD first).
    """
    if not ctxt.ops.get_cr(ctxt, 4) & X86_CR4_OSXSAVE:
        return emulate_ud(ctxt)
    eax = reg_read(ctxt, VCPU_REGS_RAX) & MASK32
    edx = reg_read(ctxt, VCPU_REGS_RDX) & MASK32
    ecx = reg_read(ctxt, VCPU_REGS_RCX) & MASK32
    if ctxt.ops.set_xcr(ctxt, ecx, edx << 32 | eax):
        return emulate_gp(ctxt, 0)
    return X86EMUL_CONTINUE


def check_svme(ctxt: X86EmulateCtxt) -> int:
    """#UD without EFER.SVME."""
    if not ctxt.ops.get_msr(ctxt, MSR_EFER)[1] & EFER_SVME:
        return emulate_ud(ctxt)
    return X86EMUL_CONTINUE


def check_svme_pa(ctxt: X86EmulateCtxt) -> int:
    """#GP(0) if RAX is no physical address of 48 bits; then as check_svme."""
    if reg_read(ctxt, VCPU_REGS_RAX) >> 48:
        return emulate_gp(ctxt, 0)
    return check_svme(ctxt)
