"""Exits to userspace, or to L1, that KVM makes instead of the instruction: there is nothing to compare.

Events and debugging userspace are no part of what an instruction does. As long as KVM runs it, they
change nothing in the comparison; where KVM leaves before that, the state must be the one that was there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import BP_VECTOR, DB_VECTOR, PF_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.devices import PIO, DeviceAccess, trace_to_obj
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, case_pages, memory_changes
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.native_view import guest_debug, kvm_of, without_harness

#: RF is saved by the exit; TF does not show while userspace steps the guest (KVM: kvm_get_rflags).
_NOT_KEPT: Final = X86_EFLAGS_RF | X86_EFLAGS_TF
#: KVM_EXIT_* -> why KVM left.
_REASONS: Final = {
    "INTR": "an event or signal is to be handled",
    "NESTED_VMEXIT": "L1 is to handle an event",
    "DEBUG": "userspace has a breakpoint there",
    "INTERNAL_ERROR": "an event cannot be delivered",
}
#: A triple fault: how a delivery in real mode ends that KVM cannot emulate (kvm_inject_realmode_interrupt).
_SHUTDOWN: Final = "SHUTDOWN"
_NOT_DELIVERED: Final = "an event that cannot be delivered in real mode ends in a shutdown"
#: KVM_GUESTDBG_INJECT_DB, KVM_GUESTDBG_INJECT_BP -> the exception that userspace has KVM deliver.
_INJECTED: Final = {1 << 18: DB_VECTOR, 1 << 19: BP_VECTOR}
_OF_USERSPACE: Final = "an exception that userspace injects comes first"
#: DR6: the bits of breakpoints, and those that are 0 for what they say. DR7: general detect.
_TRAPS: Final = 0xF
_ACTIVE_LOW: Final = 0xFFFF0FF0
_RESERVED: Final = 1 << 12
_DETECT: Final = 1 << 13
#: Bytes that such a delivery pushes: FLAGS, CS and IP (SDM Vol. 3B 21.1.4, Interrupt and Exception Handling).
_PUSHED: Final = 6
_MASK32: Final = (1 << 32) - 1
#: Bits of a page-table entry's first byte, and of the address of an entry of 4 or 8 bytes (SDM Vol. 3A 4.3).
_PRESENT: Final = 1
_ACCESSED: Final = 1 << 5
_ENTRY_MASK: Final = 3
#: KVM_INTERNAL_ERROR_EMULATION, which is about the instruction.
_EMULATION: Final = 1


def departure(case: Case, subject: Outcome) -> str:
    """Why a subject left before the instruction, with the state as it was; empty if it did not."""
    exits = (subject.extra or {}).get("exits") or ()
    if case.path is None:
        return ""
    if _injected(case, subject):
        return _OF_USERSPACE
    if not exits:
        return ""
    last = exits[-1]
    if last["reason"] == _SHUTDOWN:
        return _NOT_DELIVERED if _delivery_failed(case, subject) else ""
    if last["reason"] not in _REASONS or last.get("suberror") == _EMULATION:
        return ""
    return _REASONS[last["reason"]] if _untouched(case, subject) else ""


def _injected(case: Case, subject: Outcome) -> bool:
    """Nothing is changed, and the exception is the one that KVM_SET_GUEST_DEBUG asks for."""
    vectors = [vector for flag, vector in _INJECTED.items() if guest_debug(case) & flag]
    fault = subject.exception
    if fault is None or fault[0] not in vectors or fault[1:] != (None, None):
        return False
    return _untouched(case, msgspec.structs.replace(subject, exception=None))


def without_eventfds(case: Case, oracle: Outcome) -> Outcome:
    """An oracle's outcome without the writes that eventfds of the case take away from its devices.

    KVM's contract (KVM_IOEVENTFD): address and length of a write have to be those of the eventfd, and with
    `datamatch` its data, too; an eventfd without length takes any write.
    """
    fds = kvm_of(case).get("ioeventfds") or ()
    trace = trace_of(oracle) if fds else None
    if not trace:
        return oracle
    left = [access for access in trace if not (access.write and any(_takes(fd, access) for fd in fds))]
    if len(left) == len(trace):
        return oracle
    return msgspec.structs.replace(oracle, extra={**(oracle.extra or {}), DEVICE_TRACE: trace_to_obj(left)})


def _takes(fd: Mapping[str, Any], access: DeviceAccess) -> bool:
    if fd["addr"] != access.addr or bool(fd.get("port")) != (access.kind == PIO):
        return False
    if fd.get("len") not in {None, 0, access.size}:
        return False
    match = fd.get("datamatch")
    return match is None or match == int.from_bytes(access.data, "little")


def _delivery_failed(case: Case, subject: Outcome) -> bool:
    """Nothing was decoded, and nothing is changed but what the delivery of an event pushes."""
    ss = case.system.seg[VCPU_SREG_SS]
    mask, top = _MASK32 if ss.db else 0xFFFF, case.gpr[VCPU_REGS_RSP]
    places = {ss.base + (top - n & mask) & _MASK32 for n in range(1, _PUSHED + 1)}
    pushed = (addr + i for addr, data in memory_changes(case, subject) for i in range(len(data)))
    return (
        case.mode == "real"
        and not subject.leaf
        and _registers_kept(case, _without_payload(case, subject))
        and places.issuperset(pushed)
    )


def _without_payload(case: Case, subject: Outcome) -> Outcome:
    """The outcome with the old CR2 or DR6 if KVM has put there what the event that was to come says.

    KVM: kvm_deliver_exception_payload.
    """
    pending, system, before = kvm_of(case).get("pending") or {}, subject.system, case.system
    payload = None if pending.get("injected") else pending.get("payload")
    if payload is None:
        return _with_detection(case, subject)
    if pending["vector"] == PF_VECTOR and payload == system.cr2:
        system = msgspec.structs.replace(system, cr2=before.cr2)
    status = (before.dr[6] & ~_TRAPS | _ACTIVE_LOW | payload) ^ payload & _ACTIVE_LOW
    status &= ~_RESERVED
    registers = (*before.dr[:6], status, before.dr[7] & ~_DETECT)
    if pending["vector"] == DB_VECTOR and system.dr == registers:
        system = msgspec.structs.replace(system, dr=before.dr)
    return msgspec.structs.replace(subject, system=system)


def _with_detection(case: Case, subject: Outcome) -> Outcome:
    """The outcome with DR7.GD, which the #DB that userspace injects clears (kvm_check_and_inject_events)."""
    injected = any(guest_debug(case) & flag for flag, vector in _INJECTED.items() if vector == DB_VECTOR)
    dr = case.system.dr
    if not injected or subject.system.dr != (*dr[:7], dr[7] & ~_DETECT):
        return subject
    return msgspec.structs.replace(subject, system=msgspec.structs.replace(subject.system, dr=dr))


def _untouched(case: Case, subject: Outcome) -> bool:
    return _registers_kept(case, subject) and _only_accessed(case, subject)


def _only_accessed(case: Case, subject: Outcome) -> bool:
    """Nothing in memory is changed but accessed bits of present entries: the exit fetched the instruction."""
    before = case_pages(case)
    return all(
        not addr & _ENTRY_MASK and old & _PRESENT and old ^ new == _ACCESSED
        for start, data in memory_changes(case, subject)
        for addr, new in enumerate(data, start)
        for old in before[addr >> PAGE_SHIFT][addr & PAGE_MASK : (addr & PAGE_MASK) + 1]
    )


def _registers_kept(case: Case, subject: Outcome) -> bool:
    view = without_harness(case)
    return (
        subject.exception is None
        and subject.rip in {case.rip, view.rip}
        and subject.gpr == case.gpr
        and not (subject.rflags ^ case.rflags) & ~_NOT_KEPT
        and subject.system == case.system
        and not (subject.extra or {}).get("device_trace")
    )
