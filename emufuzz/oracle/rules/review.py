"""What the rules say about one case: which exception is due, and what is wrong with an outcome."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import (
    DB_VECTOR,
    GP_VECTOR,
    MF_VECTOR,
    PF_VECTOR,
    PFERR_USER,
    PFERR_WRITE,
    SS_VECTOR,
    UD_VECTOR,
)
from emufuzz.arch.regs import VCPU_SREG_TR
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Fault, Outcome, code_address
from emufuzz.oracle.guest_width import beyond_guest_width, guest_width
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.local_apic import without_priority
from emufuzz.oracle.native_view import check_judged, judge_case, kvm_of, native_outcome
from emufuzz.oracle.operands import place_of
from emufuzz.oracle.rules.causes import baseline, uncertain
from emufuzz.oracle.rules.control import refused_call
from emufuzz.oracle.rules.fetch import may_not_arrive
from emufuzz.oracle.rules.memory import page_faults
from emufuzz.oracle.rules.preserved import traps
from emufuzz.oracle.rules.privilege import PORTS, bitmap_unknown
from emufuzz.oracle.rules.rule import ACCESS, DECODE, PRIVILEGE, UNCAUSED, VALUE, Rule, Violation, mismatch
from emufuzz.oracle.rules.table import Selected, rules_for
from emufuzz.oracle.rules.view import View

#: Bytes of the largest operand that is one value.
_LARGEST_PART: Final = 16
#: Fields that say what hardware reported, whatever the instruction is.
_EXIT_FIELDS: Final = frozenset(("exit_qualification", "guest_physical_address", "instruction_info"))
#: Exceptions of data accesses.
_ACCESS_FAULTS: Final = frozenset((SS_VECTOR, GP_VECTOR, PF_VECTOR))
#: With more prefixes an instruction may be longer than 15 bytes; nobody knows how long an undefined one is.
_SPARE_PREFIXES: Final = 4
_GP0: Final[Fault] = (GP_VECTOR, 0, None)
_POP_MEMORY: Final = 0x8F
#: An unmasked x87 exception is pending.
_FSW_ES: Final = 0x80
#: A rule and the exception that it demands.
Due = tuple[Rule, Fault]
_JUDGED: Final = frozenset(("continue", "propagate_fault"))
_UNJUDGED_EXTRA: Final = ("livelock", "no_exit")


def check_case(case: Case) -> None:
    """Raise UnsupportedCaseError if rules about one architectural instruction do not judge the case."""
    check_judged(case)
    if case.count != 1:
        raise UnsupportedCaseError(f"count: rules are about one instruction, got {case.count}")
    if case.emul_type:
        raise UnsupportedCaseError("emul_type: it means something to KVM only")
    if guest_width(case) is not None and beyond_guest_width(CaseInstruction(judge_case(case))):
        raise UnsupportedCaseError("kvm.cpuid: a table entry has bits beyond the guest's MAXPHYADDR")
    for field in _EXIT_FIELDS & kvm_of(case).keys():
        raise UnsupportedCaseError(f"kvm.{field}: the exit need not be that of the instruction")


def faults_due(view: View, selected: Selected) -> list[Due]:
    """The exceptions that are due, those of the earliest phase alone, in the order of the table."""
    due = _first_phase(selected.early, view)
    if not due and selected.access and not view.smooth:
        due = _first_phase(selected.access, view)
    return due or _first_phase(selected.late, view)


def _first_phase(rules: tuple[Rule, ...], view: View) -> list[Due]:
    due: list[Due] = []
    for rule in rules:
        if due and rule.phase > due[0][0].phase:
            break
        wanted = rule.demanded(view)
        if wanted is not None:
            due.append((rule, wanted))
    return due


def _allowed(view: View, due: list[Due], fault: Fault) -> bool:
    """Whether an exception may come instead of those that are due: one of the same rank, or one unknown.

    Unknown are faults that the guest's page tables decide, and #UD of what a CPU need not have.
    """
    if any(fault == wanted for _, wanted in due):
        return True
    phase = due[0][0].phase
    if view.insn.mnemonic in PORTS and bitmap_unknown(view):
        if fault[0] == GP_VECTOR or _in_task(view, fault):
            return True
    if phase == DECODE and not view.insn.known and fault[0] in {GP_VECTOR, PF_VECTOR}:
        prefixed = fault[0] == GP_VECTOR and len(view.insn.prefixes) > _SPARE_PREFIXES
        return prefixed or may_not_arrive(view)
    if fault[0] == MF_VECTOR:
        fpu = view.system.fpu
        return phase >= PRIVILEGE and bool(fpu.fsw & (_FSW_ES | ~fpu.fcw & 0x3F))
    if phase >= ACCESS and fault[0] in _ACCESS_FAULTS and (view.insn.size_unknown or uncertain(view)):
        return True
    if phase == ACCESS and (_popped_first(view, fault) or (fault == _GP0 and refused_call(view))):
        return True
    if fault[0] == PF_VECTOR:
        return view.paged or (phase == ACCESS and (fault in page_faults(view) or _in_image(view, fault)))
    if fault[0] == UD_VECTOR:
        if view.insn.truncated:
            return True  # the opcode may be undefined whatever follows
        alternate = view.insn.lock and view.insn.opcode[0] == 0x0F and view.insn.opcode[1] in {0x20, 0x22}
        return alternate or (view.insn.known and view.insn.valid and not baseline(view.insn))
    return False


def _in_image(view: View, fault: Fault) -> bool:
    """#PF somewhere in an operand of many parts, as FXRSTOR has: processors begin anywhere.

    The address of a part may wrap at the address size.
    """
    address, mask = fault[2] or 0, (1 << view.address_bits) - 1
    return view.absent(address) and any(
        access.size > _LARGEST_PART and (address - access.linear & mask) < access.size
        for access in view.accesses
    )


def _in_task(view: View, fault: Fault) -> bool:
    """#PF of the processor's own read of the TSS, whose bitmap comes before the operand."""
    vector, code, address = fault
    task = view.system.seg[VCPU_SREG_TR]
    own = vector == PF_VECTOR and not (code or 0) & (PFERR_USER | PFERR_WRITE)
    return own and task.base <= (address or 0) <= task.base + task.limit


def _popped_first(view: View, fault: Fault) -> bool:
    """POP m: the stack is read before the operand is looked at (SDM Vol. 2B POP)."""
    stack = [access for access in view.accesses if not access.reference.explicit]
    refused = any(not view.segment_allows(access) for access in stack)
    return view.insn.opcode[0] == _POP_MEMORY and fault == (SS_VECTOR, 0, None) and refused


def _fault_violation(view: View, due: list[Due], found: Fault | None) -> Violation | None:
    """The first due rule that the exception breaks, or its absence."""
    if found is not None and _allowed(view, due, found):
        return None
    if found is not None:  # the rule that comes nearest to what was found
        for rule, wanted in due:
            if wanted[0] == found[0]:
                return mismatch(rule, wanted, found)
    return mismatch(*due[0], found)


def _judged(case: Case, outcome: Outcome) -> bool:
    if outcome.crash or outcome.hang or outcome.rc not in _JUDGED:
        return False
    extra: dict[str, Any] = outcome.extra or {}
    if any(extra.get(name) for name in _UNJUDGED_EXTRA):
        return False
    if case.path is None and case.extra is None and case.count == 1 and not case.emul_type:
        return True
    try:
        check_case(case)
    except UnsupportedCaseError:
        return False
    return True


def _stopped(view: View, outcome: Outcome) -> View:
    """A REP instruction that faulted after some iterations: the state before the one that did."""
    if not view.insn.repeats or outcome.exception is None or outcome.gpr == view.case.gpr:
        return view
    if traps(outcome):  # behind the last iteration
        return view
    stopped = View(msgspec.structs.replace(view.case, gpr=tuple(outcome.gpr)))
    stopped.slots = view.slots
    return stopped


def view_of(case: Case) -> View:
    """The view of a case as hardware executes it, in the memory that KVM has been given."""
    if case.path is None and case.extra is None:
        return View(case)
    view = View(judge_case(case))
    view.slots = None if case.path is None else kvm_of(case).get("memslots")
    return view


def review(case: Case, outcome: Outcome) -> tuple[Violation, ...]:
    """Every rule that an outcome breaks, faults first; nothing for cases and outcomes that none judges."""
    if not _judged(case, outcome):
        return ()
    view = view_of(case)
    if case.path is not None or case.extra is not None:
        outcome = without_priority(case, native_outcome(case, outcome))
    if view.slots is not None and not _in_slots(view, view.slots):
        return ()  # there is no code
    selected = rules_for(view.insn)
    now = _stopped(view, outcome)
    found = []
    due = faults_due(now, selected)
    fault = outcome.exception
    trapped = fault is not None and fault[0] == DB_VECTOR and outcome.rc == "continue"
    if trapped and outcome.rip == view.case.rip:
        return ()  # a breakpoint: the instruction has not run, or not all of its iterations
    if due:
        violation = _fault_violation(now, due, None if trapped else fault)
        if violation is not None:
            found.append(violation)
    rules = selected.completed if fault is None or trapped else selected.faulted
    if fault is not None and not trapped and not due and not traps(outcome):
        rules = selected.uncaused + rules
    if due and (fault is None or trapped):
        rules = ()  # what follows from going on all the same says nothing
    if outcome.events or outcome.extra:
        rules += selected.events
    for rule in rules:
        wrong = rule.finds(now if rule.kind == UNCAUSED else view, outcome) if rule.finds else None
        if wrong is not None:
            found.append(rule.violation(wrong))
    return tuple(found)


def _in_slots(view: View, slots: Sequence[Mapping[str, Any]]) -> bool:
    """The code begins where KVM has memory, or nobody knows where it is."""
    place = place_of(view.case, code_address(view.case))
    return place is None or any(slot["base"] <= place < slot["base"] + slot["size"] for slot in slots)


def early_faults(view: View) -> set[Fault]:
    """The exceptions that are due before an operand is looked at, whatever it is."""
    due = faults_due(view, rules_for(view.insn))
    return {fault for rule, fault in due if rule.phase < ACCESS}


def first_due(case: Case, outcome: Outcome) -> Fault | None:
    """The first exception that is due where an outcome stopped, None if there is none."""
    view = _stopped(view_of(case), outcome)
    due = faults_due(view, rules_for(view.insn))
    return due[0][1] if due else None


def determined(case: Case) -> Fault | None:
    """The one exception that must come, None if there is none or the rules leave a choice."""
    view = view_of(case)
    due = faults_due(view, rules_for(view.insn))
    faults = {fault for _, fault in due}
    if len(faults) != 1:
        return None
    fault = next(iter(faults))
    if view.paged and due[0][0].phase in {0, ACCESS, VALUE}:
        return None
    undecided = view.insn.known and view.insn.valid and not baseline(view.insn) and fault[0] != UD_VECTOR
    other = due[0][0].phase == ACCESS and len(set(page_faults(view)) | faults) > 1
    return None if undecided or other else fault
