"""Exceptions that need a reason: what none of the other rules demands must not come."""

from __future__ import annotations

from typing import Final

from iced_x86 import CpuidFeature, FlowControl, Mnemonic

from emufuzz.arch import exceptions
from emufuzz.arch.cr import X86_CR0_AM, X86_CR0_EM, X86_CR0_TS
from emufuzz.arch.rflags import X86_EFLAGS_AC
from emufuzz.case.model import Outcome
from emufuzz.oracle.rules.control import branch_target, far_jump, near_branch
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.memory import opaque
from emufuzz.oracle.rules.privilege import PORTS
from emufuzz.oracle.rules.rule import UNCAUSED, Check, Encoding, Found, Rule, show_fault
from emufuzz.oracle.rules.segments import loaded_segment
from emufuzz.oracle.rules.view import MASK32, MASK64, View

#: What every processor has that runs in the mode: no CPUID bit makes these #UD.
_BASELINE: Final = frozenset(
    (CpuidFeature.INTEL8086, CpuidFeature.INTEL186, CpuidFeature.INTEL286, CpuidFeature.INTEL386,
     CpuidFeature.INTEL486, CpuidFeature.X64, CpuidFeature.CMOV)
)  # fmt: skip
_GATED_IN_LONG: Final = frozenset((Mnemonic.LAHF, Mnemonic.SAHF))
_DIVIDES: Final = frozenset((Mnemonic.DIV, Mnemonic.IDIV, Mnemonic.AAM))
_DESCRIPTORS: Final = frozenset(
    (Mnemonic.LLDT, Mnemonic.LTR, Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ,
     Mnemonic.INT, Mnemonic.INT3, Mnemonic.INTO, Mnemonic.INT1)
)  # fmt: skip
_NEAR_FLOW: Final = frozenset(
    (FlowControl.NEXT, FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH,
     FlowControl.INDIRECT_BRANCH, FlowControl.CALL, FlowControl.INDIRECT_CALL, FlowControl.RETURN)
)  # fmt: skip
_OTHER_CHECKS: Final = frozenset(
    (Mnemonic.ENTER, Mnemonic.PUSHF, Mnemonic.PUSHFD, Mnemonic.PUSHFQ, Mnemonic.POPF, Mnemonic.POPFD,
     Mnemonic.POPFQ, Mnemonic.CLI, Mnemonic.STI, Mnemonic.RETF, Mnemonic.SGDT, Mnemonic.SIDT, Mnemonic.SLDT,
     Mnemonic.STR, Mnemonic.SMSW, Mnemonic.BOUND, Mnemonic.RDTSC, Mnemonic.RDPMC, Mnemonic.CPUID)
)  # fmt: skip


def baseline(insn: Decoded) -> bool:
    """A valid encoding of an instruction that every processor has."""
    if not insn.valid or (insn.long and insn.mnemonic in _GATED_IN_LONG):
        return False
    return set(insn.lax.cpuid_features()) <= _BASELINE


def plain(insn: Decoded) -> bool:
    """An instruction all of whose faults the rules know: accesses, branch targets, division."""
    if not baseline(insn) or opaque(insn) or insn.lax.is_privileged or insn.mnemonic in PORTS:
        return False
    if far_jump(insn) or loaded_segment(insn) is not None or insn.mnemonic in _OTHER_CHECKS:
        return False
    branch66 = insn.long and 0x66 in insn.prefixes and insn.lax.flow_control != FlowControl.NEXT
    return insn.lax.flow_control in _NEAR_FLOW and not branch66


def _vector(outcome: Outcome) -> int:
    return -1 if outcome.exception is None else outcome.exception[0]


def _extra(outcome: Outcome) -> Found:
    return Found("exception", show_fault(outcome.exception))


def _undefined(_view: View, outcome: Outcome) -> Found | None:
    return _extra(outcome) if _vector(outcome) == exceptions.UD_VECTOR else None


def uncertain(view: View) -> bool:
    """An access may fault that does not have to: conditional, wrapping at 4 GiB, or of another iteration."""
    return any(not access.reference.certain or view.wraps(access) for access in view.accesses) or (
        view.insn.null_override and bool(view.accesses)
    )


def _protection(view: View, outcome: Outcome) -> Found | None:
    wanted = {exceptions.GP_VECTOR, exceptions.SS_VECTOR}
    if _vector(outcome) not in wanted or uncertain(view) or _unknown_target(view):
        return None
    return _extra(outcome)


def _unknown_target(view: View) -> bool:
    """A near branch to where a device, or memory behind page tables, says."""
    return near_branch(view.insn) and branch_target(view) is None


def _page(view: View, outcome: Outcome) -> Found | None:
    """In flat memory #PF comes from absent pages alone."""
    if _vector(outcome) != exceptions.PF_VECTOR or outcome.exception is None or not view.flat:
        return None
    address = outcome.exception[2]
    return None if address is None or view.absent(address) else _extra(outcome)


def _page_place(view: View, outcome: Outcome) -> Found | None:
    """#PF at an address that the instruction accesses."""
    if _vector(outcome) != exceptions.PF_VECTOR or outcome.exception is None or not view.flat:
        return None
    address, mask = outcome.exception[2] or 0, MASK64 if view.long else MASK32
    touched = any((address - access.linear & mask) < max(access.size, 1) for access in view.accesses)
    return None if touched or view.insn.truncated else _extra(outcome)


def _alignment(view: View, outcome: Outcome) -> Found | None:
    checked = view.system.cr0 & X86_CR0_AM and view.case.rflags & X86_EFLAGS_AC and view.cpl == 3
    return _extra(outcome) if _vector(outcome) == exceptions.AC_VECTOR and not checked else None


def _divide(view: View, outcome: Outcome) -> Found | None:
    if _vector(outcome) != exceptions.DE_VECTOR:
        return None
    memory = view.explicit is not None and view.operand(0) is None
    return None if view.insn.mnemonic in _DIVIDES and memory else _extra(outcome)


def _not_available(view: View, outcome: Outcome) -> Found | None:
    off = view.system.cr0 & (X86_CR0_EM | X86_CR0_TS)
    return _extra(outcome) if _vector(outcome) == exceptions.NM_VECTOR and not off else None


def _not_present(_view: View, outcome: Outcome) -> Found | None:
    vectors = {exceptions.NP_VECTOR, exceptions.TS_VECTOR}
    return _extra(outcome) if _vector(outcome) in vectors else None


def _no_descriptors(insn: Decoded) -> bool:
    loads = loaded_segment(insn) is not None or far_jump(insn)
    return insn.valid and not loads and insn.mnemonic not in _DESCRIPTORS


def _rule(name: str, citation: str, demand: str, encoding: Encoding | None, finds: Check) -> Rule:
    return Rule(name, UNCAUSED, citation, demand, None, encoding, finds=finds)


# fmt: off
RULES: Final = (
    _rule("ud-cause", "SDM Vol. 3A 6.15, #UD", "a valid instruction that every processor has is not #UD",
          baseline, _undefined),
    _rule("gp-cause", "SDM Vol. 3A 6.15, #GP", "accesses that all checks allow are neither #GP nor #SS",
          plain, _protection),
    _rule("pf-cause", "SDM Vol. 3A 4.7", "a page that is there does not fault", None, _page),
    _rule("pf-place", "SDM Vol. 3A 4.7", "the address of a #PF is one that the instruction accesses",
          plain, _page_place),
    _rule("ac-cause", "SDM Vol. 3A 6.15, #AC", "alignment is checked at CPL 3 with CR0.AM and RFLAGS.AC only",
          None, _alignment),
    _rule("de-cause", "SDM Vol. 3A 6.15, #DE", "#DE is for division", None, _divide),
    _rule("nm-cause", "SDM Vol. 3A 6.15, #NM", "#NM needs CR0.TS or CR0.EM", None, _not_available),
    _rule("np-cause", "SDM Vol. 3A 6.15, #NP", "#NP and #TS are for loads of descriptors",
          _no_descriptors, _not_present),
)
# fmt: on
