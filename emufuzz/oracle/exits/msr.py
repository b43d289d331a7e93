"""RDMSR and WRMSR of MSRs that userspace is asked about (SDM Vol. 2B RDMSR, WRMSR).

What userspace answers is part of the case: it knows the MSRs of `system.msr`, and denies any other.
"""

from __future__ import annotations

from typing import Final

from emufuzz.arch.cr import X86_CR0_PE
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDX, VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome
from emufuzz.oracle.exits.run import NoExitError, Run
from emufuzz.oracle.native_view import asks_for_msr, forced_prefix, judge_case

_RDMSR: Final = b"\x0f\x32"
_WRMSR: Final = b"\x0f\x30"
_LENGTH: Final = 2
_MASK32: Final = 0xFFFFFFFF
_FILTERED: Final = 4  # KVM_MSR_EXIT_REASON_FILTER, without which a denied access is #GP(0)


def msr_completion(run: Run) -> Outcome:
    """EDX:EAX is what userspace has; #GP(0) if it has nothing.

    Raises:
        UnsupportedCaseError: Userspace is not asked.
        NoExitError: There is no instruction.
    """
    case = run.case
    for field in ("pending", "vectoring_info"):
        if run.kvm.get(field):
            raise UnsupportedCaseError(f"kvm.{field}: an event is delivered first")
    if not asks_for_msr(case):
        raise UnsupportedCaseError("kvm.knobs.msr_denied: userspace is not asked")
    prefix = forced_prefix(case)
    code = case.code.removeprefix(prefix)
    if code[:_LENGTH] not in {_RDMSR, _WRMSR}:
        raise UnsupportedCaseError("code: it is no plain RDMSR or WRMSR")
    view, limit = judge_case(case), case.system.seg[VCPU_SREG_CS].limit
    if case.mode != "prot64" and view.rip + _LENGTH - 1 > limit:
        raise NoExitError("code: it lies beyond the limit of CS")
    mask = (1 << 64) - 1 if case.mode == "prot64" else _MASK32
    run.rip = run.rip + len(prefix) & mask
    if case.system.cr0 & X86_CR0_PE and case.system.seg[VCPU_SREG_SS].dpl:
        return _refused(run)
    index = case.gpr[VCPU_REGS_RCX] & _MASK32
    values = dict(case.system.msr)
    asked = run.kvm.get("knobs", {}).get("user_space_msr_mask", _FILTERED) & _FILTERED
    if not asked or index not in values:
        return _refused(run)
    if code.startswith(_RDMSR):
        run.gpr[VCPU_REGS_RAX] = values[index] & _MASK32
        run.gpr[VCPU_REGS_RDX] = values[index] >> 32
    run.rip, run.rflags = run.rip + _LENGTH & mask, run.rflags & ~X86_EFLAGS_RF
    return run.outcome()


def _refused(run: Run) -> Outcome:
    outcome = run.faulted()
    outcome.rip = run.rip
    return outcome
