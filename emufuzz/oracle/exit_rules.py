"""Rules that recognise how KVM's handling of exits departs from the SDM (emufuzz.oracle.quirks)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec
from iced_x86 import Mnemonic, Register, RegisterExt

from emufuzz.arch.cr import X86_CR4_UMIP
from emufuzz.arch.exceptions import DB_VECTOR, GP_VECTOR, PF_VECTOR, SS_VECTOR
from emufuzz.arch.linear import linear_bits, sign_extended
from emufuzz.arch.regs import VCPU_REGS_RAX, VCPU_REGS_RCX, VCPU_REGS_RDX
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.devices import PIO
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_SHIFT, Case, Fault, Outcome, System
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.exits.before import breaks
from emufuzz.oracle.exits.real import real_event
from emufuzz.oracle.exits.run import OpenError, Run
from emufuzz.oracle.exits.task import KVM, task_switch
from emufuzz.oracle.gaps import vouches_for_nothing
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import asks_for_msr, guest_debug, is_stepped, kvm_of
from emufuzz.oracle.operands import changed_bytes, operand_size, place_of
from emufuzz.oracle.places import Places
from emufuzz.oracle.rules.memory import segment_fault
from emufuzz.oracle.rules.view import View
from emufuzz.oracle.stand_in import plain_store, without_override

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_GP0: Final = (GP_VECTOR, 0, None)
_SS0: Final = (SS_VECTOR, 0, None)
_SYSENTER: Final = (0x175, 0x176)  # IA32_SYSENTER_ESP, IA32_SYSENTER_EIP
_EOI: Final = 0xFEE000B0
_MASK32: Final = 0xFFFFFFFF
_TSC_DEADLINE: Final = 0x6E0
_BYTE: Final = 0xFF
#: The bits of CR8.
_PRIORITY: Final = 0xF
_MASK64: Final = (1 << 64) - 1
#: KVM_EXIT_* that looks for events between two instructions, and tells of none.
_BETWEEN: Final = "INTR"
#: How rules call it.
_TF_CHANGED: Final = "TF changed"
_HIDDEN: Final = frozenset((_TF_CHANGED, "no #DB"))
_REAL_EVENT: Final = "rmode-inject"
_TRAP: Final = (DB_VECTOR, None, None)
#: Whose OUT KVM completes early (KVM: kvm_fast_pio_out, KVM_X86_QUIRK_OUT_7E_INC_RIP).
#: KVM_GUESTDBG_USE_HW_BP, DR7.GD, and MOV from and to a debug register.
_OWN_BREAKPOINTS: Final = 1 << 17
_DETECT: Final = 1 << 13
_DEBUG_MOVES: Final = frozenset((b"\x0f\x21", b"\x0f\x23"))
#: DR4 and DR5 stand for DR6 and DR7 (SDM Vol. 3B 18.2.2).
_ALIASES: Final = {4: 6, 5: 7}
#: Bits of DR6 and DR7 that keep what is written on every processor (SDM Vol. 3B 18.2.3, 18.2.4).
_DR_WRITABLE: Final = {6: 0xE00F, 7: 0xFFFF23FF}
_PORT_7E: Final = 0x7E


def task_state(case: Case, subject: Outcome, _: Outcome, __: Sequence[Difference]) -> bool:
    """A task switch that is in everything what KVM makes of it (emufuzz.oracle.exits.task.KVM)."""
    try:
        other = task_switch(Run(case), KVM)
    except (OpenError, UnsupportedCaseError):
        return False
    if is_stepped(case):  # TF is userspace's own
        other.rflags &= ~X86_EFLAGS_TF
    waiting = "exception" in {field for field, _ in other.unchecked}  # beside the switch
    waiting |= other.exception is None and subject.exception == _pending(case)
    return _same(subject, other) and (waiting or subject.exception == other.exception)


def _pending(case: Case) -> Fault | None:
    """The exception that waits in the case, None if none does or if it has a payload."""
    pending = kvm_of(case).get("pending")
    if pending is None or "payload" in pending:
        return None
    return pending["vector"], pending.get("error_code"), None


def table_limit(case: Case, subject: Outcome, _: Outcome, __: Sequence[Difference]) -> bool:
    """An event of real mode that is delivered as if the vector table had no limit."""
    try:
        if real_event(Run(case)).exception is None:
            return False
        if is_stepped(case):  # TF is userspace's own, and not pushed
            case = msgspec.structs.replace(case, rflags=case.rflags & ~X86_EFLAGS_TF)
        other = real_event(Run(case), checks_limit=False)
    except (OpenError, UnsupportedCaseError):
        return False
    other.rflags |= subject.rflags & X86_EFLAGS_RF  # which exceptions set
    if "dr6" in {field for field, _ in other.unchecked}:
        other.system = msgspec.structs.replace(other.system, dr=subject.system.dr)
    return _same(subject, other) and subject.exception == other.exception


def _same(a: Outcome, b: Outcome) -> bool:
    return (a.gpr, a.rip, a.rflags, a.pages, a.system) == (b.gpr, b.rip, b.rflags, b.pages, b.system)


def lost_single_step(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """The last thing was a write that userspace was told of: KVM forgets the single-step trap."""
    return forgets_trap(case, subject, differences) and (
        oracle.exception is None or _known_beside_trap(case, subject, oracle)
    )


def forgets_trap(case: Case, subject: Outcome, differences: Sequence[Difference]) -> bool:
    """Whether a single-step trap may be missing behind a write that userspace was told of."""
    exits = [left for left in (subject.extra or {}).get("exits") or () if left["reason"] != _BETWEEN]
    told = exits and (exits[-1].get("is_write") or exits[-1].get("direction") == "out")
    return bool(
        told
        and case.rflags & X86_EFLAGS_TF
        and subject.exception is None
        and {d.field for d in differences} == {"exception"}
    )


def _known_beside_trap(case: Case, subject: Outcome, oracle: Outcome) -> bool:
    """Whether nothing differs beside a single-step trap but what is a quirk of its own."""
    from emufuzz.oracle.quirks import explaining_quirk  # noqa: PLC0415 - whose rules these are

    rest = beside_trap(case, subject, oracle)
    if not rest:
        return rest is not None
    return explaining_quirk(case, trapped(subject, oracle), oracle, rest) is not None


def beside_trap(case: Case, subject: Outcome, oracle: Outcome) -> tuple[Difference, ...] | None:
    """What differs beside a single-step trap, behind which nothing is compared; None if there is another."""
    from emufuzz.oracle.compare import compare  # noqa: PLC0415 - which looks for quirks

    if (subject.exception, oracle.exception) != (None, _TRAP):
        return None
    return compare(case, trapped(subject, oracle), oracle)


def trapped(subject: Outcome, oracle: Outcome) -> Outcome:
    """The subject's outcome as if it had trapped."""
    return msgspec.structs.replace(subject, exception=_TRAP, rc=oracle.rc)


def read_before_umip(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """SLDT and STR that CR4.UMIP forbids: KVM reads their destination first, and that may fault."""
    ours, operand = subject.exception, View(case).explicit
    forbidden = case.system.cr4 & X86_CR4_UMIP and View(case).cpl
    if operand is None or not forbidden or ours is None:
        return False
    if {d.field for d in differences} == {DEVICE_TRACE}:
        asked = trace_of(subject) or ()
        size = sum(len(access.data) for access in asked)
        refused = ours == _GP0 and size <= operand_size(case, subject.leaf)
        return refused and not any(access.write for access in asked) and not changed_bytes(case, subject)
    refused = ours == segment_fault(operand) == _SS0 and not View(case).segment_allows(operand)
    if ours[0] != PF_VECTOR and not refused:
        return False
    return (
        oracle.exception == _GP0
        and (refused or 0 <= (ours[2] or 0) - operand.linear < operand_size(case, subject.leaf))
        and (subject.gpr, subject.rip) == (case.gpr, case.rip)
        and not subject.pages
    )


def table_on_device(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """The emulator's system accesses reach no device, and nobody hears of it: the guest is where it was.

    Only a single-step trap tells this from a guest that does the same for ever. Behind the device there may
    be a page that a processor cannot reach; what lies in memory before it is written.
    """
    return bool(
        case.rflags & X86_EFLAGS_TF
        and (subject.exception, subject.rip, subject.gpr) == (_TRAP, case.rip, case.gpr)
        and changed_bytes(case, subject).items() <= changed_bytes(case, oracle).items()
        and subject.system == case.system
        and (trace_of(oracle) or _begins_in_device(case))
        and (oracle.exception == _TRAP or (oracle.exception or _TRAP)[0] == PF_VECTOR)
    )


def _begins_in_device(case: Case) -> bool:
    """The first byte of the operand is in no memory."""
    operand, places = View(case).explicit, Places(case)
    try:
        return operand is not None and not all(
            places.readable(place >> PAGE_SHIFT) for place, _ in places.parts(operand.linear, 1)
        )
    except KeyError:
        return False


def breakpoint_again(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """RF, which lets an instruction pass its breakpoint, is lost in an exit that the instruction makes."""
    again = msgspec.structs.replace(case, rflags=case.rflags & ~X86_EFLAGS_RF)
    return bool(
        case.rflags & X86_EFLAGS_RF
        and breaks(again)
        and subject.exception == _TRAP
        and (subject.gpr, subject.rip) == (case.gpr, case.rip)
        and not changed_bytes(case, subject)
        and not trace_of(subject)
        and ({d.field for d in differences} == {"exception"} or oracle.rip != case.rip)
        and (oracle.exception != _TRAP or bool(case.rflags & X86_EFLAGS_TF and oracle.rip != case.rip))
    )


def hidden_trap_flag(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """Userspace steps the guest: TF is its own, neither shown, nor followed by the guest's trap.

    It may have been set, or POPF has loaded it.
    """
    if not is_stepped(case) or not (case.rflags | oracle.rflags) & X86_EFLAGS_TF:
        return False
    if case.path == _REAL_EVENT:
        return _delivered_without_trap(case, subject)
    if not {d.field for d in differences} <= {"exception", "rflags"}:
        return False
    seen = {d.subject for d in differences}
    if vouches_for_nothing(oracle) or seen <= _HIDDEN:  # rules, which say what they object to
        return _TF_CHANGED in seen and seen <= _HIDDEN
    rest = beside_trap(case, subject, oracle)
    only_flags = rest is not None and {d.field for d in rest} <= {"rflags"}
    delivered = 0 if subject.exception in {None, _TRAP} else X86_EFLAGS_RF  # which a fault sets later on
    return not (subject.rflags ^ oracle.rflags) & ~(X86_EFLAGS_TF | delivered) and (
        subject.exception == oracle.exception or only_flags
    )


def _delivered_without_trap(case: Case, subject: Outcome) -> bool:
    """An event in real mode pushes FLAGS without TF, and is all else that it should be."""
    try:
        other = real_event(Run(msgspec.structs.replace(case, rflags=case.rflags & ~X86_EFLAGS_TF)))
    except (OpenError, UnsupportedCaseError):
        return False
    other.rflags |= subject.rflags & X86_EFLAGS_RF
    return _same(subject, other) and subject.exception == other.exception


def hidden_detection(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """Userspace has breakpoints of its own: DR7 is its own, too, and the guest's GD detects nothing.

    KVM: kvm_update_dr7, handle_dr.
    """
    return bool(
        guest_debug(case) & _OWN_BREAKPOINTS
        and case.system.dr[7] & _DETECT
        and CaseInstruction(case).opcode[:2] in _DEBUG_MOVES
        and {d.field for d in differences} == {"exception"}
        and (subject.exception, oracle.exception) == (None, _TRAP)
        and _moved(case, subject)
    )


def _moved(case: Case, subject: Outcome) -> bool:
    """MOV from or to a debug register has been done, and nothing else."""
    decoded = CaseInstruction(case).decode(lax=True)
    gpr, dr, mask = list(case.gpr), list(case.system.dr), _MASK64 if case.mode == "prot64" else _MASK32
    reads = RegisterExt.is_dr(decoded.op1_register)
    to, source = RegisterExt.number(decoded.op0_register), RegisterExt.number(decoded.op1_register)
    if reads:
        gpr[to] = dr[_ALIASES.get(source, source)] & mask
    else:
        to = _ALIASES.get(to, to)
        bits = _DR_WRITABLE.get(to, _MASK64)
        dr[to] = gpr[source] & mask & bits | subject.system.dr[to] & ~bits  # the rest reads as it always does
    done = subject.rip == case.rip + int(decoded.len) & mask
    same = subject.gpr == tuple(gpr) and subject.system == msgspec.structs.replace(case.system, dr=tuple(dr))
    return done and same and not changed_bytes(case, subject)


def lost_port_7e(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """OUT to port 7eh moves RIP before it leaves for userspace; the step that this ends leaves instead."""
    written = [(access.kind, access.addr, access.write) for access in trace_of(oracle) or ()]
    return (
        is_stepped(case)
        and {d.field for d in differences} == {DEVICE_TRACE}
        and written == [(PIO, _PORT_7E, True)]
        and not trace_of(subject)
    )


def fast_eoi(case: Case, subject: Outcome, _oracle: Outcome, __: Sequence[Difference]) -> bool:
    """A write to EOI is taken for a MOV: the instruction is skipped, whatever else it does.

    KVM: handle_apic_access, with the module's parameter fasteoi.
    """
    instruction = CaseInstruction(case)
    store = plain_store(case) or without_override(case)  # what KVM takes the instruction for
    if store is not None:
        instruction = CaseInstruction(msgspec.structs.replace(case, code=store))
    written = [place_of(case, access.linear) for access in instruction.accesses if access.write]
    mask = _MASK64 if case.mode == "prot64" else _MASK32
    return (
        _EOI in written
        and subject.exception in {None, _TRAP}
        and subject.rip == case.rip + int(instruction.decode(lax=True).len) & mask
        and not (subject.rflags ^ case.rflags) & ~X86_EFLAGS_RF
        and (subject.gpr, subject.system) == (case.gpr, case.system)
        and not changed_bytes(case, subject)
    )


def short_priority(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV to CR8: its exit takes the low byte of the value; bits above it should be #GP(0)."""
    decoded = CaseInstruction(case).decode(lax=True)
    if decoded.mnemonic != Mnemonic.MOV or decoded.op0_register != Register.CR8:
        return False
    value = case.gpr[RegisterExt.number(decoded.op1_register)]
    return (
        value & _BYTE <= _PRIORITY < value
        and (subject.exception, oracle.exception) == (None, _GP0)
        and subject.system == msgspec.structs.replace(case.system, cr8=value & _BYTE)
        and (subject.gpr, subject.rip) == (case.gpr, case.rip + int(decoded.len))
        and not (subject.rflags ^ case.rflags) & ~X86_EFLAGS_RF
        and not subject.pages
    )


def unfiltered_deadline(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """WRMSR of the TSC deadline is done in the fast path of its exit, which knows nothing of filters."""
    return (
        case.gpr[VCPU_REGS_RCX] & _MASK32 == _TSC_DEADLINE
        and asks_for_msr(case)
        and (subject.exception, oracle.exception) == (None, _GP0)
        and (subject.gpr, _without_deadline(subject.system)) == (case.gpr, _without_deadline(case.system))
        and subject.rip == case.rip + int(CaseInstruction(case).decode(lax=True).len)
        and not (subject.rflags ^ case.rflags) & ~X86_EFLAGS_RF
        and not subject.pages
    )


def _without_deadline(system: System) -> System:
    others = tuple(pair for pair in system.msr if pair[0] != _TSC_DEADLINE)
    return msgspec.structs.replace(system, msr=others)


def sysenter_address(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """WRMSR of an address that is not canonical: KVM extends the sign of it."""
    index = case.gpr[VCPU_REGS_RCX] & _MASK32
    value = case.gpr[VCPU_REGS_RDX] << 32 & _MASK64 | case.gpr[VCPU_REGS_RAX] & _MASK32
    la57 = kvm_of(case).get("knobs", {}).get("host_la57")  # the host's width counts
    extended = sign_extended(value, 57 if la57 else linear_bits(case.system.cr4))
    return bool(
        index in _SYSENTER
        and extended != value
        and subject.exception is None
        and oracle.exception == _GP0
        and subject.gpr == case.gpr
        and not subject.pages
        and dict(subject.system.msr).get(index, extended) == extended
    )
