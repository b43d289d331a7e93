"""Events in real mode, which go through the interrupt vector table (SDM Vol. 3B 20.1.4)."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import DF_VECTOR, GP_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_IF, X86_EFLAGS_TF
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome
from emufuzz.oracle.exits.run import OpenError, Run
from emufuzz.oracle.instruction import outside_limit

#: What has begun comes before what waits (SDM Vol. 3A 6.9): `interrupt` is in the middle of its delivery.
_ORDER: Final = ("pending", "interrupt", "nmi")
_NMI: Final = 2
_ENTRY: Final = 4
_WORD: Final = 2
_MASK16: Final = 0xFFFF
#: Exceptions that instructions raise on purpose: the way back leads behind them.
_SOFTWARE: Final = frozenset((3, 4))
_DEBUG: Final = 1
_PAGE_FAULT: Final = 14
#: Exceptions of which two in a row are a #DF, and #PF (SDM Vol. 3A Table 6-4).
_CONTRIBUTORY: Final = frozenset((0, 10, 11, 12, 13, 14))
#: DR7.GD, which #DB clears (SDM Vol. 3B 18.2.4).
_GENERAL_DETECT: Final = 1 << 13
_CLEARED: Final = X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC


def real_event(run: Run, *, checks_limit: bool = True) -> Outcome:
    """The first event of the case is delivered; beyond the limit of the table there is #GP or #DF instead.

    Args:
        run: The case's state.
        checks_limit: The processor does look at the limit, and KVM does not.

    Raises:
        UnsupportedCaseError: There is none, or another one is being delivered.
        OpenError: The delivery faults otherwise.
    """
    vector, software = _event(run.kvm)
    base, limit = run.case.system.idtr.base, run.case.system.idtr.limit
    if checks_limit and vector * _ENTRY + _ENTRY - 1 > limit:
        return _beyond_limit(run, vector)
    back = run.rip + (run.length() if software else 0)
    for value in (run.rflags, run.seg[VCPU_SREG_CS].sel, back):
        _push(run, value)
    offset = run.read(base + vector * _ENTRY, _WORD)
    selector = run.read(base + vector * _ENTRY + _WORD, _WORD)
    run.put_segment(
        VCPU_SREG_CS,
        msgspec.structs.replace(run.seg[VCPU_SREG_CS], sel=selector, base=selector << 4),
    )
    run.rip = offset
    run.rflags &= ~_CLEARED
    _payload(run, vector)
    return run.delivered()


def _beyond_limit(run: Run, vector: int) -> Outcome:
    """SDM Vol. 2A INT n; Vol. 3A Table 6-5 for an exception on the way to another. No error codes here."""
    exception = "pending" in run.kvm
    if exception and vector == DF_VECTOR:
        raise OpenError("the processor shuts down")
    doubled = exception and vector in _CONTRIBUTORY
    return run.faulted((DF_VECTOR if doubled else GP_VECTOR, None, None))


def _payload(run: Run, vector: int) -> None:
    """CR2 has the address of a #PF; which bits of DR6 a #DB sets is not all that its payload says."""
    pending = run.kvm.get("pending") or {}
    if vector == _DEBUG:
        run.open.append("dr6")
        if pending.get("payload") is not None and not pending.get("injected"):
            dr = run.case.system.dr
            run.fields["dr"] = (*dr[:7], dr[7] & ~_GENERAL_DETECT)
    if vector == _PAGE_FAULT and pending.get("payload") is not None and not pending.get("injected"):
        run.fields["cr2"] = pending["payload"]


def _event(kvm: Any) -> tuple[int, bool]:
    """(vector, whether the instruction at RIP raised it on purpose)."""
    if "vectoring_info" in kvm:
        raise UnsupportedCaseError("kvm: more than the event is at work")
    events = [name for name in _ORDER if kvm.get(name)]
    if not events:
        raise UnsupportedCaseError("kvm: there is no event")
    if events[0] == "nmi":
        return _NMI, False
    event = kvm[events[0]]
    if events[0] == "pending" and event.get("nested"):
        raise UnsupportedCaseError("kvm.pending: the exception is L1's to handle")
    if events[0] == "interrupt":
        return int(event["vector"]), bool(event.get("soft"))
    return int(event["vector"]), event["vector"] in _SOFTWARE


def _push(run: Run, value: int) -> None:
    """16 bits onto the stack, whose pointer has 16 bits or, in a large segment, 32."""
    stack = run.seg[VCPU_SREG_SS]
    mask = 0xFFFFFFFF if stack.db else _MASK16
    pointer = run.gpr[VCPU_REGS_RSP]
    offset = pointer - _WORD & mask
    if outside_limit(stack, offset, _WORD):
        raise OpenError("the stack ends")
    run.write(stack.base + offset, _WORD, value)
    run.gpr[VCPU_REGS_RSP] = pointer & ~mask | offset
