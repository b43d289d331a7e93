"""Model-specific registers, time stamp, performance counters (SDM Vol. 2: RDMSR, WRMSR, RDTSC, RDPMC, RDPID).

emulate.c: em_wrmsr, em_rdmsr, em_rdtsc, em_rdpmc, em_rdpid, check_rdtsc, check_rdpmc.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import X86_CR4_PCE, X86_CR4_TSD
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.emulator.ctxt import X86EmulateCtxt, reg_read, reg_write
from emufuzz.emulator.faults import emulate_gp, emulate_ud
from emufuzz.emulator.x86emul import MASK32, X86EMUL_CONTINUE, X86EMUL_PROPAGATE_FAULT

MSR_IA32_TSC: Final = 0x10
MSR_TSC_AUX: Final = 0xC0000103
#: Pseudo performance counters of VMware (host TSC, real time, apparent time).
_VMWARE_BACKDOOR_PMCS: Final = (0x10000, 0x10001, 0x10002)


def _write_edx_eax(ctxt: X86EmulateCtxt, value: int) -> None:
    reg_write(ctxt, VCPU_REGS_RAX, value & MASK32)
    reg_write(ctxt, VCPU_REGS_RDX, value >> 32)


def em_wrmsr(ctxt: X86EmulateCtxt) -> int:
    """WRMSR: #GP(0) whatever fault the callback names."""
    index = reg_read(ctxt, VCPU_REGS_RCX) & MASK32
    low = reg_read(ctxt, VCPU_REGS_RAX) & MASK32
    high = reg_read(ctxt, VCPU_REGS_RDX) & MASK32
    rc = ctxt.ops.set_msr_with_filter(ctxt, index, high << 32 | low)
    return emulate_gp(ctxt, 0) if rc == X86EMUL_PROPAGATE_FAULT else rc


def em_rdmsr(ctxt: X86EmulateCtxt) -> int:
    """RDMSR."""
    rc, data = ctxt.ops.get_msr_with_filter(ctxt, reg_read(ctxt, VCPU_REGS_RCX) & MASK32)
    if rc == X86EMUL_PROPAGATE_FAULT:
        return emulate_gp(ctxt, 0)
    if rc == X86EMUL_CONTINUE:
        _write_edx_eax(ctxt, data)
    return rc


def check_rdtsc(ctxt: X86EmulateCtxt) -> int:
    """#GP(0) above CPL 0 with CR4.TSD."""
    if ctxt.ops.get_cr(ctxt, 4) & X86_CR4_TSD and ctxt.ops.cpl(ctxt):
        return emulate_gp(ctxt, 0)
    return X86EMUL_CONTINUE


def em_rdtsc(ctxt: X86EmulateCtxt) -> int:
    """RDTSC."""
    _write_edx_eax(ctxt, ctxt.ops.get_msr(ctxt, MSR_IA32_TSC)[1])
    return X86EMUL_CONTINUE


def em_rdpid(ctxt: X86EmulateCtxt) -> int:
    """RDPID r: IA32_TSC_AUX."""
    if not ctxt.ops.guest_has_rdpid(ctxt):
        return emulate_ud(ctxt)
    ctxt.dst.val = ctxt.ops.get_msr(ctxt, MSR_TSC_AUX)[1]
    return X86EMUL_CONTINUE


def check_rdpmc(ctxt: X86EmulateCtxt) -> int:
    """#GP(0) above CPL 0 without CR4.PCE, or for a counter that does not exist."""
    index = reg_read(ctxt, VCPU_REGS_RCX) & MASK32
    if ctxt.enable_vmware_backdoor and index in _VMWARE_BACKDOOR_PMCS:
        return X86EMUL_CONTINUE
    ops = ctxt.ops
    if not ops.get_cr(ctxt, 4) & X86_CR4_PCE and ops.cpl(ctxt):
        return emulate_gp(ctxt, 0)
    return emulate_gp(ctxt, 0) if ops.check_rdpmc_early(ctxt, index) else X86EMUL_CONTINUE


def em_rdpmc(ctxt: X86EmulateCtxt) -> int:
    """RDPMC."""
    failed, value = ctxt.ops.read_pmc(ctxt, reg_read(ctxt, VCPU_REGS_RCX) & MASK32)
    if failed:
        return emulate_gp(ctxt, 0)
    _write_edx_eax(ctxt, value)
    return X86EMUL_CONTINUE
