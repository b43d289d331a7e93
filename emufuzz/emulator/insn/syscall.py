"""Fast system calls (SDM Vol. 2: SYSCALL, SYSENTER, SYSEXIT; Vol. 3A 5.8.7, 5.8.8).

emulate.c: setup_syscalls_segments, em_syscall, em_sysenter, em_sysexit. SYSRET is not implemented.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import EFER_LMA, EFER_SCE
from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import (
    VCPU_REGS_R11,
    VCPU_REGS_RCX,
    VCPU_REGS_RDX,
    VCPU_REGS_RSP,
    VCPU_SREG_CS,
    VCPU_SREG_SS,
)
from emufuzz.arch.rflags import X86_EFLAGS_FIXED, X86_EFLAGS_IF, X86_EFLAGS_TF, X86_EFLAGS_VM
from emufuzz.emulator.access import MSR_EFER
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read, reg_write
from emufuzz.emulator.faults import emulate_gp, emulate_ud
from emufuzz.emulator.x86emul import (
    MASK16,
    MASK32,
    MASK64,
    X86EMUL_CONTINUE,
    X86EMUL_MODE_PROT16,
    X86EMUL_MODE_PROT32,
    X86EMUL_MODE_PROT64,
    X86EMUL_MODE_REAL,
    X86EMUL_UNHANDLEABLE,
)

MSR_IA32_SYSENTER_CS: Final = 0x174
MSR_IA32_SYSENTER_ESP: Final = 0x175
MSR_IA32_SYSENTER_EIP: Final = 0x176
MSR_STAR: Final = 0xC0000081
MSR_LSTAR: Final = 0xC0000082
MSR_CSTAR: Final = 0xC0000083
MSR_SYSCALL_MASK: Final = 0xC0000084


def _msr(ctxt: X86EmulateCtxt, index: int) -> int:
    return ctxt.ops.get_msr(ctxt, index)[1]


def _load_flat_segments(ctxt: X86EmulateCtxt, cs_sel: int, ss_sel: int, dpl: int, long: bool) -> None:
    """Load CS and SS with the fixed flat segments of fast system calls."""
    cs = DescStruct(0, 0xFFFFF, type=0xB, s=1, dpl=dpl, p=1, l=int(long), d=int(not long), g=1)
    ss = DescStruct(0, 0xFFFFF, type=3, s=1, dpl=dpl, p=1, d=1, g=1)
    ctxt.ops.set_segment(ctxt, cs_sel & MASK16, cs, 0, VCPU_SREG_CS)
    ctxt.ops.set_segment(ctxt, ss_sel & MASK16, ss, 0, VCPU_SREG_SS)


def em_syscall(ctxt: X86EmulateCtxt) -> int:
    """SYSCALL.

    KVM deviation: the mode is not updated, so from compatibility mode (AMD) the target in CSTAR
    is cut to 32 bits (APM Vol. 3 SYSCALL).
    """
    if ctxt.mode < X86EMUL_MODE_PROT16:
        return emulate_ud(ctxt)
    if ctxt.mode != X86EMUL_MODE_PROT64 and ctxt.ops.guest_cpuid_is_intel_compatible(ctxt):
        return emulate_ud(ctxt)
    efer = _msr(ctxt, MSR_EFER)
    if not efer & EFER_SCE:
        return emulate_ud(ctxt)
    lma = bool(efer & EFER_LMA)
    star = _msr(ctxt, MSR_STAR)
    _load_flat_segments(ctxt, star >> 32 & 0xFFFC, (star >> 32) + 8, 0, lma)
    reg_write(ctxt, VCPU_REGS_RCX, ctxt.next_eip)
    if lma:
        reg_write(ctxt, VCPU_REGS_R11, ctxt.eflags)
        ctxt.next_eip = _msr(ctxt, MSR_LSTAR if ctxt.mode == X86EMUL_MODE_PROT64 else MSR_CSTAR)
        ctxt.eflags = ctxt.eflags & ~_msr(ctxt, MSR_SYSCALL_MASK) | X86_EFLAGS_FIXED
    else:
        ctxt.next_eip = star & MASK32
        ctxt.eflags &= ~(X86_EFLAGS_VM | X86_EFLAGS_IF)
    ctxt.tf = ctxt.eflags & X86_EFLAGS_TF != 0
    return X86EMUL_CONTINUE


def em_sysenter(ctxt: X86EmulateCtxt) -> int:
    """SYSENTER.

    KVM deviation: in 64-bit mode it is unhandleable (SDM Vol. 2B SYSENTER).
    """
    if ctxt.mode == X86EMUL_MODE_REAL:
        return emulate_gp(ctxt, 0)
    lma = bool(_msr(ctxt, MSR_EFER) & EFER_LMA)
    if ctxt.mode == X86EMUL_MODE_PROT64:
        ctxt.fail_reason = "SYSENTER in 64-bit mode"
        return X86EMUL_UNHANDLEABLE
    if lma and not ctxt.ops.guest_cpuid_is_intel_compatible(ctxt):
        return emulate_ud(ctxt)
    selector = _msr(ctxt, MSR_IA32_SYSENTER_CS)
    if not selector & 0xFFFC:
        return emulate_gp(ctxt, 0)
    ctxt.eflags &= ~(X86_EFLAGS_VM | X86_EFLAGS_IF)
    cs_sel = selector & 0xFFFC
    _load_flat_segments(ctxt, cs_sel, cs_sel + 8, 0, lma)
    mask = MASK64 if lma else MASK32
    ctxt.next_eip = _msr(ctxt, MSR_IA32_SYSENTER_EIP) & mask
    reg_write(ctxt, VCPU_REGS_RSP, _msr(ctxt, MSR_IA32_SYSENTER_ESP) & mask)
    if lma:
        ctxt.mode = X86EMUL_MODE_PROT64
    return X86EMUL_CONTINUE


def em_sysexit(ctxt: X86EmulateCtxt) -> int:
    """SYSEXIT; REX.W selects a 64-bit target.

    KVM deviation: the 64-bit form refuses only SYSENTER_CS = 0, not all null selectors
    (SDM Vol. 2B SYSEXIT).
    """
    if ctxt.mode < X86EMUL_MODE_PROT16:
        return emulate_gp(ctxt, 0)
    to_64bit = bool(ctxt.rex_prefix & 8)
    rsp = reg_read(ctxt, VCPU_REGS_RCX)
    rip = reg_read(ctxt, VCPU_REGS_RDX)
    selector = _msr(ctxt, MSR_IA32_SYSENTER_CS)
    if to_64bit:
        canonical = ctxt.ops.is_canonical_addr
        if not selector or not canonical(ctxt, rsp, 0) or not canonical(ctxt, rip, 0):
            return emulate_gp(ctxt, 0)
        cs_sel = selector + 32 & MASK16
        ss_sel = cs_sel + 8
    else:
        if not selector & 0xFFFC:
            return emulate_gp(ctxt, 0)
        cs_sel, ss_sel = selector + 16, selector + 24
        rsp &= MASK32
        rip &= MASK32
    _load_flat_segments(ctxt, cs_sel | 3, ss_sel | 3, 3, to_64bit)
    ctxt.next_eip = rip
    ctxt.mode = X86EMUL_MODE_PROT64 if to_64bit else X86EMUL_MODE_PROT32
    reg_write(ctxt, VCPU_REGS_RSP, rsp)
    return X86EMUL_CONTINUE
