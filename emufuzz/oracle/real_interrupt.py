"""Software interrupts in real mode: whether the subject did exactly what KVM does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from emufuzz.arch.exceptions import PF_VECTOR, PFERR_WRITE, SS_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RSP, VCPU_SREG_CS, VCPU_SREG_SS
from emufuzz.arch.rflags import X86_EFLAGS_AC, X86_EFLAGS_IF, X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.model import Case, Fault, Outcome, Segment
from emufuzz.oracle.instruction import outside_limit
from emufuzz.oracle.operands import changed_bytes, operand_size
from emufuzz.oracle.rules.view import MASK32, MASK64, View

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: INT3 and INTO have their vectors; that of INT n is its operand, which KVM takes for a signed byte.
_VECTORS: Final = {"cc": 3, "ce": 4}
_INT: Final = "cd"
_BYTE, _SIGN = 0x100, 0x80
_ENTRY: Final = 4
_HALF: Final = 2
_FOUR_GIGABYTES: Final = 1 << 32
_ALLOWED: Final = frozenset(
    ("exception", "exception.address", "exception.error_code", "mem", "rip", "rsp", "seg.cs", "rflags")
)
_CLEARED: Final = X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_AC | X86_EFLAGS_RF


def real_interrupt(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """INT3, INTO, INT n in real mode: the order of KVM's reads, its wide frame, its signed vector.

    All of the outcome has to be KVM's; and if frame and vector are as they should be, only the order, and
    thus the address of the fault, may differ.
    """
    if case.mode != "real" or not {d.field for d in differences} <= _ALLOWED:
        return False
    size, vector = operand_size(case, subject.leaf), _vector(case, subject)
    if size == _HALF and vector >= 0 and not _both_fault(case, subject, oracle, vector):
        return False
    view = View(case)
    written, fault = _pushed(view, _length(case, subject), size)
    if not _memory_is(view, subject, written):
        return False
    if fault is not None:
        return subject.exception == fault and _faulted_alone(case, subject)
    return _arrives(view, subject, size, vector)


def _vector(case: Case, subject: Outcome) -> int:
    if subject.leaf != _INT:
        return _VECTORS[subject.leaf]
    number = case.code[case.code.index(0xCD) + 1]
    return number - _BYTE if number & _SIGN else number


def _both_fault(case: Case, subject: Outcome, oracle: Outcome, vector: int) -> bool:
    """The table's entry is absent; a processor reads the offset first."""
    ours, theirs = subject.exception, oracle.exception
    place = case.system.idtr.base + vector * _ENTRY
    return ours is not None and theirs is not None and theirs[0] == PF_VECTOR and theirs[2] == place


def _pushed(view: View, length: int, size: int) -> tuple[dict[int, int], Fault | None]:
    """What is written of flags, CS and IP, address -> byte, and the fault of a push."""
    case, seg = view.case, view.system.seg
    stack, written = seg[VCPU_SREG_SS], dict[int, int]()
    values = (case.rflags & ~X86_EFLAGS_RF, seg[VCPU_SREG_CS].sel, case.rip + length)
    for number, value in enumerate(values, 1):
        top = case.gpr[VCPU_REGS_RSP] - number * size & (MASK32 if stack.db else 0xFFFF)
        if _outside(stack, top, size):
            return written, (SS_VECTOR, 0, None)
        image = (value & (1 << size * 8) - 1).to_bytes(size, "little")
        for offset, byte in enumerate(image, top):
            at = stack.base + offset & MASK32
            if view.absent(at):
                return written, (PF_VECTOR, PFERR_WRITE, at)
            written[at] = byte
    return written, None


def _outside(stack: Segment, offset: int, size: int) -> bool:
    """As KVM checks it: over the end of 4 GiB an access goes on at its beginning."""
    if offset + size <= _FOUR_GIGABYTES:
        return outside_limit(stack, offset, size)
    return outside_limit(stack, offset, 1) or outside_limit(stack, offset + size - 1 & MASK32, 1)


def _memory_is(view: View, subject: Outcome, written: dict[int, int]) -> bool:
    """Memory has changed to what was written, and nowhere else."""
    changed = changed_bytes(view.case, subject)
    return changed.items() <= written.items() and all(
        at in changed or view.number(at, 1) == byte for at, byte in written.items()
    )


def _length(case: Case, subject: Outcome) -> int:
    """Bytes of the instruction; a subject that faults may not say."""
    return subject.length or case.code.index(int(subject.leaf, 16)) + (2 if subject.leaf == _INT else 1)


def _arrives(view: View, subject: Outcome, size: int, vector: int) -> bool:
    """The subject stands where the entry that KVM reads leads, or at the fault of a read, selector first."""
    place = view.system.idtr.base + vector * _ENTRY & MASK64
    for at in (place + 2, place):
        if view.number(at, 2) is None:
            return _faulted_alone(view.case, subject) and subject.exception == (PF_VECTOR, 0, at)
    case, cs = view.case, subject.system.seg[VCPU_SREG_CS]
    selector = view.number(place + 2, 2) or 0
    mask = MASK32 if view.system.seg[VCPU_SREG_SS].db else 0xFFFF
    rsp = case.gpr[VCPU_REGS_RSP]
    return (
        subject.exception is None
        and (cs.sel, cs.base) == (selector, selector << 4)
        and subject.rip == view.number(place, 2)
        and subject.gpr[VCPU_REGS_RSP] == (rsp & ~mask | rsp - 3 * size & mask)
        and subject.rflags == case.rflags & ~_CLEARED
    )


def _faulted_alone(case: Case, subject: Outcome) -> bool:
    """SDM Vol. 3A 6.5: nothing but memory has changed."""
    same = subject.gpr == case.gpr and subject.rflags == case.rflags and subject.system == case.system
    return same and subject.rip == case.rip
