"""Differences in how an instruction ends: shadows, RF, TF, requests. They come after all others."""

from __future__ import annotations

from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.fuzz.handlers.pair import Pair
from emufuzz.kvm.rflags import KVM_GUESTDBG_SINGLESTEP
from emufuzz.kvm.vcpu import KVM_REQ_EVENT

_MSR_EXITS = ("X86_RDMSR", "X86_WRMSR")


def _denied(pair: Pair) -> bool:
    """Userspace refused the MSR: the emulator does not come back to the instruction."""
    exits = pair.predicted["exits"]
    return pair.faulted and bool(exits) and exits[-1]["reason"] in _MSR_EXITS


def _concluded(pair: Pair) -> bool:
    return pair.concluded and not _denied(pair)


def shadow_after_fault(pair: Pair) -> bool:
    """A fault: the handler keeps the interrupt shadow, the emulator's end drops it."""
    if not pair.predicted["interrupt_shadow"] or not _concluded(pair):
        return False
    if pair.predicted["interrupt_shadow"] != pair.shadow:
        return False
    pair.predicted["interrupt_shadow"] = 0
    pair.request_event()
    return True


def shadow_event(pair: Pair) -> bool:
    """The shadow ends: the emulator has events looked at again, skipping an instruction does not."""
    if not pair.shadow or not _concluded(pair) or KVM_REQ_EVENT in pair.predicted["requests"]:
        return False
    pair.request_event()
    return True


def prefix_event(pair: Pair) -> bool:
    """The prefix with RF cleared stores RFLAGS, and with that has events looked at again."""
    if not pair.clears_rf or KVM_REQ_EVENT in pair.predicted["requests"]:
        return False
    pair.request_event()
    return True


def rf_after_fault(pair: Pair) -> bool:
    """Hardware saves RF as 0 when an instruction exits; what the emulator does not complete keeps it."""
    if not pair.case.rflags & X86_EFLAGS_RF or pair.clears_rf:
        return False
    if _concluded(pair) and not pair.faulted:
        return False
    for name in ("rflags", "hardware_rflags"):
        pair.predicted[name] |= X86_EFLAGS_RF
    return True


def debugger_tf(pair: Pair) -> bool:
    """A debugger that steps: the emulator stores RFLAGS without its TF, skipping leaves them alone."""
    if not pair.guest_debug & KVM_GUESTDBG_SINGLESTEP or not _concluded(pair) or pair.faulted:
        return False
    if not pair.predicted["hardware_rflags"] & X86_EFLAGS_TF:
        return False
    pair.predicted["hardware_rflags"] &= ~X86_EFLAGS_TF
    return True
