"""Comparison of what a subject did with what an oracle says, and the verdict on a case.

Everything that both sides define is compared: whether the instruction completed or faulted, the
exception, GPRs, RIP, RFLAGS, memory and the rest of the state. The only flags that do not count
are those that the SDM leaves undefined for this very instruction (emufuzz.arch.effects); the only
destination that does not count is one that it leaves undefined.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, NamedTuple

from msgspec.structs import replace

from emufuzz.arch.effects import (
    ANY_COUNT,
    UNDEFINED_FLAGS,
    undefined_flags_exact,
    undefined_results,
)
from emufuzz.arch.exceptions import BP_VECTOR, DB_VECTOR, OF_VECTOR, PF_VECTOR
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_ZF, flag_names
from emufuzz.case.model import PAGE_SHIFT, ZERO_PAGE, Case, Fpu, Outcome, System, case_pages
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.departures import departure, without_eventfds
from emufuzz.oracle.device_trace import DEVICE_TRACE, differing_accesses, show_access
from emufuzz.oracle.mistaken import mistaken
from emufuzz.oracle.native_view import judge_case, native_outcome
from emufuzz.oracle.operands import destination, operand_size, shift_count
from emufuzz.oracle.reasons import reason_for
from emufuzz.oracle.stopping import oracle_at_stop

AGREE: Final = "agree"
FINDING: Final = "finding"
SKIPPED: Final = "skipped"
#: What reasons begin with that are no quirk, gap or refusal: KVM left before the instruction.
LEFT: Final = "subject-left"

#: Kinds of differences, the weightiest first: a bucket is named after the first that occurs.
KINDS: Final = (
    "crash",
    "hang",
    "fault-missing",
    "fault-extra",
    "fault-vector",
    "fault-error-code",
    "fault-address",
    "rip",
    "gpr",
    "memory",
    "system",
    "rflags",
    "device-trace",
)

#: Leaf -> flags undefined whatever the operands; those of shifts depend on the count.
_ALWAYS_UNDEFINED: Final = {
    leaf: mask for leaf, mask in UNDEFINED_FLAGS.items() if undefined_flags_exact(leaf, 4, 0) == mask
}

_INS: Final = ("6c", "6d")  # which KVM interrupts where what it has read ahead ends

_REAL_EVENT: Final = "rmode-inject"  # whose pseudo-code does not mention RF (SDM Vol. 2A INT n)
_NO_FAULTS: Final = frozenset((DB_VECTOR, BP_VECTOR, OF_VECTOR))

#: What ids of quirks begin with; other reasons are gaps of an oracle.
_QUIRK: Final = "kvm-"

_RUN: Final = 8  # bytes of memory in one difference
_STRIDE: Final = 256  # bytes that are compared at once in search of one


class Difference(NamedTuple):
    """One field on which subject and oracle differ; `kind` is one of KINDS.

    `field` is a GPR's name, `rip`, `rflags`, `exception` (`.error_code`, `.address`), `mem`, `seg.cs`,
    `fpu.xmm0`, another field of System, or `device_trace`. For `mem` `at` is the linear address, or the
    physical one in a case with `phys`; for `device_trace` that of the access, or the port.
    """

    field: str
    kind: str
    subject: str
    oracle: str
    at: int | None = None


class Verdict(NamedTuple):
    """`kind` is AGREE, FINDING or SKIPPED; `reason` names why a case was skipped."""

    kind: str
    reason: str
    differences: tuple[Difference, ...]


_AGREED: Final = Verdict(AGREE, "", ())


def agree(a: Outcome, b: Outcome) -> bool:
    """Whether subject and oracle are alike, but for flags that their leaf always leaves undefined.

    The fast path: a False says only that `compare` must look.
    """
    if a.rip != b.rip or a.rc != b.rc or a.gpr != b.gpr or a.exception != b.exception or a.crash:
        return False
    if a.rflags != b.rflags and (
        a.exception is not None or (a.rflags ^ b.rflags) & ~_ALWAYS_UNDEFINED.get(a.leaf, 0)
    ):
        return False
    if a.interruptibility != b.interruptibility:
        return False
    if a.extra is not None and b.extra is not None and a.extra.get(DEVICE_TRACE) != b.extra.get(DEVICE_TRACE):
        return False
    return a.pages == b.pages and (a.system is b.system or a.system == b.system)


def compare(case: Case, subject: Outcome, oracle: Outcome) -> tuple[Difference, ...]:
    """Everything on which the two outcomes differ, in the order of KINDS within groups.

    When one side faults and the other does not, or with another vector, only that is reported:
    the rest follows from it. A case of an exit path counts as what hardware executes natively.
    """
    if case.path is not None and (_sets_rf(subject) or case.path == _REAL_EVENT):
        oracle = replace(oracle, rflags=oracle.rflags & ~X86_EFLAGS_RF | subject.rflags & X86_EFLAGS_RF)
    oracle, subject = without_eventfds(case, oracle), native_outcome(case, subject)
    case = judge_case(case)
    faults = tuple(_fault_differences(subject, oracle))
    if any(d.kind in ("fault-missing", "fault-extra", "fault-vector") for d in faults):
        return faults
    rest = [
        *_register_differences(case, subject, oracle),
        *_memory_differences(case, subject, oracle),
        *_system_differences(subject.system, oracle.system),
        *_shadow_differences(subject, oracle),
        *_trace_differences(case, subject, oracle),
    ]
    if _cr2_is_pending(case, subject, oracle):
        rest = [d for d in rest if d.field != "cr2"]
    if rest and not is_fault(subject) and case.count == 1:
        ignored = undefined_destination(case, subject, oracle)
        also = DEVICE_TRACE if ignored == "mem" else ignored  # what is stored may be stored in a device
        rest = [d for d in rest if d.field not in (ignored, also)]
    return (*faults, *rest)


def is_fault(outcome: Outcome) -> bool:
    """An exception came instead of the end of the instruction; a single-step trap comes behind it."""
    fault = outcome.exception
    return fault is not None and not (fault[0] == DB_VECTOR and outcome.rc == "continue")


def _sets_rf(subject: Outcome) -> bool:
    """A fault waits whose delivery sets RF; until then RF is what the exit saved (SDM Vol. 3C 27.3.3).

    KVM: kvm_check_and_inject_events.
    """
    return subject.exception is not None and subject.exception[0] not in _NO_FAULTS


def _cr2_is_pending(case: Case, subject: Outcome, oracle: Outcome) -> bool:
    """Both raise a #PF, and CR2 will be its address; KVM loads CR2 only when it delivers the exception."""
    ours, theirs = subject.exception, oracle.exception
    if ours is None or theirs is None or ours[0] != PF_VECTOR:
        return False
    return subject.system.cr2 in (case.system.cr2, ours[2]) and oracle.system.cr2 == theirs[2]


def judge(case: Case, subject: Outcome, outcome: Outcome, oracle: Oracle) -> Verdict:
    """The verdict on one case, given what subject and oracle made of it."""
    if agree(subject, outcome):
        return _AGREED
    refused = refusal(subject) or left_before(case, subject)
    if refused:
        return Verdict(SKIPPED, refused, ())
    if subject.crash or subject.hang:
        return Verdict(FINDING, "", (failure(subject),))
    if case.path is not None or subject.leaf in _INS:
        outcome = oracle_at_stop(case, subject, outcome, oracle)
    differences = compare(case, subject, outcome)
    if not differences:
        return _AGREED
    reason = reason_for(case, subject, outcome, differences, oracle)
    if not reason.startswith(_QUIRK):
        another = mistaken(case, subject, oracle, judge)
        reason = reason if another is None else another
    return Verdict(SKIPPED if reason else FINDING, reason, differences)


def refusal(subject: Outcome) -> str:
    """Why there is nothing to compare: the subject refused the case; empty if it did not."""
    if subject.rc in ("continue", "propagate_fault") or subject.crash or subject.hang:
        return ""
    return f"subject-{subject.rc}: {subject.reason or 'no reason given'}"


def left_before(case: Case, subject: Outcome) -> str:
    """Why there is nothing to compare: KVM left instead of running the instruction; empty if it did not."""
    why = departure(case, subject)
    return why and f"{LEFT}: {why}"


def failure(subject: Outcome) -> Difference:
    """The difference that a crash or hang of the subject is."""
    if subject.hang:
        return Difference("subject", "hang", "hang", "")
    return Difference("subject", "crash", subject.crash, "")


def primary_kind(differences: tuple[Difference, ...]) -> str:
    """The weightiest kind among differences."""
    return min((d.kind for d in differences), key=KINDS.index)


def _fault_differences(subject: Outcome, oracle: Outcome) -> Iterator[Difference]:
    ours, theirs = subject.exception, oracle.exception
    if ours == theirs:
        return
    shown = (_show_fault(ours), _show_fault(theirs))
    if ours is None or theirs is None:
        yield Difference("exception", "fault-missing" if ours is None else "fault-extra", *shown)
    elif ours[0] != theirs[0]:
        yield Difference("exception", "fault-vector", *shown)
    else:
        if ours[1] != theirs[1]:
            yield Difference("exception.error_code", "fault-error-code", *shown)
        if ours[0] == PF_VECTOR and ours[2] != theirs[2]:
            yield Difference("exception.address", "fault-address", *shown)


def _show_fault(fault: tuple[int, int | None, int | None] | None) -> str:
    if fault is None:
        return "none"
    vector, code, address = fault
    text = f"vector {vector}" + ("" if code is None else f" error {code:#x}")
    return text if address is None else f"{text} address {address:#x}"


def _register_differences(case: Case, subject: Outcome, oracle: Outcome) -> Iterator[Difference]:
    if subject.rip != oracle.rip:
        yield Difference("rip", "rip", hex(subject.rip), hex(oracle.rip))
    for name, a, b in zip(GPR_NAMES, subject.gpr, oracle.gpr, strict=True):
        if a != b:
            yield Difference(name, "gpr", hex(a), hex(b))
    differing = subject.rflags ^ oracle.rflags
    if differing:
        if not is_fault(subject):
            differing &= ~undefined_now(case, subject)
        if differing:
            yield Difference(
                "rflags",
                "rflags",
                _show_flags(subject.rflags, differing),
                _show_flags(oracle.rflags, differing),
            )


def _show_flags(rflags: int, differing: int) -> str:
    """Those of the differing flags that are set."""
    return " ".join(flag_names(rflags & differing)) or "-"


def undefined_now(case: Case, subject: Outcome) -> int:
    """The RFLAGS bits that the SDM leaves undefined after this instruction with these operands."""
    if subject.leaf not in UNDEFINED_FLAGS:
        return 0
    if case.count != 1:
        return UNDEFINED_FLAGS[subject.leaf]  # the operands of the last instruction are not known
    count = shift_count(case, subject)
    size = operand_size(case, subject.leaf)
    return undefined_flags_exact(subject.leaf, size, ANY_COUNT if count is None else count)


def undefined_destination(case: Case, subject: Outcome, oracle: Outcome) -> str | None:
    """The field of the destination operand if the SDM leaves its value undefined, else None.

    Whether the source of BSF and BSR was 0 is taken from ZF as the oracle has it.
    """
    size = operand_size(case, subject.leaf)
    count = shift_count(case, subject)
    source = 0 if oracle.rflags & X86_EFLAGS_ZF else 1
    if undefined_results(subject.leaf, size, count=ANY_COUNT if count is None else count, source=source):
        return destination(case, subject.leaf)
    return None


def _memory_differences(case: Case, subject: Outcome, oracle: Outcome) -> Iterator[Difference]:
    if subject.pages == oracle.pages:
        return
    pages = case_pages(case)
    for pfn in sorted(subject.pages.keys() | oracle.pages.keys()):
        old = pages.get(pfn, ZERO_PAGE)
        a, b = subject.pages.get(pfn, old), oracle.pages.get(pfn, old)
        if a != b:
            yield from _page_differences(pfn << PAGE_SHIFT, a, b)


def _page_differences(address: int, a: bytes, b: bytes) -> Iterator[Difference]:
    """Runs of at most _RUN bytes, each from a differing byte on."""
    i, size = 0, len(a)
    while i < size:
        if a[i] != b[i]:
            end = i + _RUN
            yield Difference("mem", "memory", a[i:end].hex(), b[i:end].hex(), address + i)
            i = end
        elif not i & _STRIDE - 1 and a[i : i + _STRIDE] == b[i : i + _STRIDE]:
            i += _STRIDE
        else:
            i += 1


def _shadow_differences(subject: Outcome, oracle: Outcome) -> Iterator[Difference]:
    if subject.interruptibility != oracle.interruptibility:
        shown = (str(subject.interruptibility), str(oracle.interruptibility))
        yield Difference("interruptibility", "system", *shown)


def _trace_differences(case: Case, subject: Outcome, oracle: Outcome) -> Iterator[Difference]:
    for ours, theirs in differing_accesses(case, subject, oracle):
        access = ours or theirs
        at = None if access is None else access.addr
        yield Difference(DEVICE_TRACE, "device-trace", show_access(ours), show_access(theirs), at)


def _system_differences(a: System, b: System) -> Iterator[Difference]:
    if a is b or a == b:
        return
    for field in System.__struct_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if x == y:
            continue
        if field == "fpu":
            yield from _fpu_differences(x, y)
        elif field in _NAMES:
            for name, p, q in zip(_NAMES[field], x, y, strict=True):
                if p != q:
                    yield Difference(name, "system", _show(p), _show(q))
        else:
            yield Difference(field, "system", _show(x), _show(y))


def _fpu_differences(a: Fpu, b: Fpu) -> Iterator[Difference]:
    for field in Fpu.__struct_fields__:
        x, y = getattr(a, field), getattr(b, field)
        if isinstance(x, int):
            x, y = (x,), (y,)
        for i, (p, q) in enumerate(zip(x, y, strict=True)):
            if p != q:
                name = f"fpu.{field}{i}" if len(x) > 1 else f"fpu.{field}"
                yield Difference(name, "system", _show(p), _show(q))


#: Fields of System that are tuples: the names of their members.
_NAMES: Final = {"seg": tuple(f"seg.{name}" for name in SREG_NAMES), "dr": tuple(f"dr{i}" for i in range(8))}


def _show(value: Any) -> str:
    return hex(value) if isinstance(value, int) else repr(value)
