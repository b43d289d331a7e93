"""Whether hardware exits for an instruction in this state, or executes it, or faults first.

SDM Vol. 3C 25.1.1 "Relative Priority of Faults and VM Exits", 25.1.2 and 25.1.3 (instructions that exit
always, and by their controls).
"""

from __future__ import annotations

from typing import Final, NamedTuple

from emufuzz.arch import cr as crs
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.emulator.ctxt import X86EmulateCtxt
from emufuzz.kvm import exit_reasons as er
from emufuzz.kvm import vmcs_fields as vf
from emufuzz.kvm import vmx_bits as vb
from emufuzz.kvm.debugregs import kvm_vcpu_check_hw_bp
from emufuzz.kvm.exit_system import CR_LMSW, CR_MOV_FROM, CR_MOV_TO
from emufuzz.kvm.machine import KvmMachine
from emufuzz.kvm.regs import is_protmode, kvm_read_cr4_bits
from emufuzz.kvm.rflags import kvm_get_linear_rip
from emufuzz.kvm.rflags_read import vmx_get_rflags
from emufuzz.kvm.segments import vmx_get_cpl
from emufuzz.kvm.vcpu import Vcpu

_EXECUTE: Final = 0


class NoExitError(Exception):
    """Hardware does not exit for this instruction in this state; the message says what it does."""


class ExitRow(NamedTuple):
    """An instruction that exits: the reason, and whether the processor looks at its privilege first."""

    reason: int
    privileged: bool


# fmt: off
#: Exit reason -> the primary control without which there is no exit.
_CONTROLS: Final = {
    er.EXIT_REASON_HLT:                 vb.CPU_BASED_HLT_EXITING,
    er.EXIT_REASON_INVLPG:              vb.CPU_BASED_INVLPG_EXITING,
    er.EXIT_REASON_MWAIT_INSTRUCTION:   vb.CPU_BASED_MWAIT_EXITING,
    er.EXIT_REASON_MONITOR_INSTRUCTION: vb.CPU_BASED_MONITOR_EXITING,
    er.EXIT_REASON_RDPMC:               vb.CPU_BASED_RDPMC_EXITING,
    er.EXIT_REASON_DR_ACCESS:           vb.CPU_BASED_MOV_DR_EXITING,
}
#: The same for control registers.
_CR_CONTROLS: Final = {
    (CR_MOV_TO,   3): vb.CPU_BASED_CR3_LOAD_EXITING,
    (CR_MOV_FROM, 3): vb.CPU_BASED_CR3_STORE_EXITING,
    (CR_MOV_TO,   8): vb.CPU_BASED_CR8_LOAD_EXITING,
    (CR_MOV_FROM, 8): vb.CPU_BASED_CR8_STORE_EXITING,
}
#: Control registers of which L1 owns bits -> their mask and what the guest is to read.
_SHADOWED: Final = {
    0: (vf.CR0_GUEST_HOST_MASK, vf.CR0_READ_SHADOW),
    4: (vf.CR4_GUEST_HOST_MASK, vf.CR4_READ_SHADOW),
}
# fmt: on


def check_entered(machine: KvmMachine) -> None:
    """The guest can run at all, and comes to the instruction at RIP.

    Raises:
        NoExitError: VM entry would fail, or a breakpoint stops it.
    """
    vcpu = machine.vcpu
    if vcpu.emulation_required:
        raise NoExitError("hardware cannot enter the guest")
    blocked = vcpu.vmcs.values[vf.GUEST_INTERRUPTIBILITY_INFO] & vb.GUEST_INTR_STATE_MOV_SS
    if blocked or vmx_get_rflags(vcpu) & X86_EFLAGS_RF:
        return
    dr7 = vcpu.vmcs.values[vf.GUEST_DR7]
    if kvm_vcpu_check_hw_bp(kvm_get_linear_rip(vcpu), _EXECUTE, dr7, vcpu.eff_db):
        raise NoExitError("a breakpoint stops the instruction")


def check_faults(machine: KvmMachine, ctxt: X86EmulateCtxt, row: ExitRow) -> None:
    """What ranks above the exit, and whether the exit is asked for.

    MOV DR exits ahead of its privilege check (SDM Vol. 3C 25.1.3).

    Raises:
        NoExitError: The instruction faults, or is executed.
    """
    vcpu = machine.vcpu
    cpl = vmx_get_cpl(vcpu)
    if ctxt.lock_prefix:
        raise NoExitError("a LOCK prefix is #UD")
    if row.privileged and vcpu.rmode.vm86_active:
        raise NoExitError("real mode runs as virtual-8086 mode, where the instruction is #GP")
    if row.privileged and cpl:
        raise NoExitError("at CPL > 0 the instruction faults")
    if row.reason == er.EXIT_REASON_RDPMC and cpl and is_protmode(vcpu):
        if not kvm_read_cr4_bits(vcpu, crs.X86_CR4_PCE):
            raise NoExitError("without CR4.PCE the instruction faults at CPL > 0")
    if row.reason == er.EXIT_REASON_XSETBV and not kvm_read_cr4_bits(vcpu, crs.X86_CR4_OSXSAVE):
        raise NoExitError("without CR4.OSXSAVE XSETBV is #UD")
    if row.reason == er.EXIT_REASON_PAUSE_INSTRUCTION and cpl:
        raise NoExitError("PAUSE exits from loops at CPL 0 only")
    _check_control(vcpu, _CONTROLS.get(row.reason, 0))


def _check_control(vcpu: Vcpu, control: int) -> None:
    if control and not vcpu.vmcs.values[vf.CPU_BASED_VM_EXEC_CONTROL] & control:
        raise NoExitError("the exit is not asked for")


def check_cr(vcpu: Vcpu, kind: int, cr: int, value: int) -> None:
    """MOV to CR, MOV from CR, LMSW: exits only by control, or if it changes a bit that the host owns.

    Args:
        vcpu: The vCPU.
        kind: CR_MOV_TO, CR_MOV_FROM or CR_LMSW.
        cr: The register.
        value: What is loaded; LMSW looks at bits 3:0.

    Raises:
        NoExitError: It does not exit.
    """
    if cr not in (0, 2, 3, 4, 8):
        raise NoExitError(f"CR{cr} is #UD")
    if cr == 2 or (kind == CR_MOV_FROM and cr in _SHADOWED):
        raise NoExitError("the access never exits")
    if cr not in _SHADOWED:
        _check_control(vcpu, _CR_CONTROLS[kind, cr])
        return
    mask, shadow = (vcpu.vmcs.values[field] for field in _SHADOWED[cr])
    changed = (value ^ shadow) & mask
    if kind == CR_LMSW:
        changed &= 0xF if value & ~shadow & crs.X86_CR0_PE else 0xE
    if not changed:
        raise NoExitError("no bit changes that the host owns")
