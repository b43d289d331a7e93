"""The rules behind the quirks that only checking oracles see: KVM raises another fault, or at another place.

An access that a processor would refuse, or would not make, is worked out from the case alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.arch.cr import EFER_SVME, X86_CR4_OSFXSR
from emufuzz.arch.descriptors import DESC_CODE, DESC_READABLE
from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, PFERR_USER, PFERR_WRITE, SS_VECTOR, UD_VECTOR
from emufuzz.arch.regs import (
    VCPU_REGS_RAX,
    VCPU_REGS_RBP,
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RSI,
    VCPU_REGS_RSP,
    VCPU_SREG_SS,
    VCPU_SREG_TR,
)
from emufuzz.arch.rflags import X86_EFLAGS_DF
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE, Case, Fault, Outcome
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.operands import changed_bytes, operand_size, prefix_facts
from emufuzz.oracle.rules.memory import segment_fault
from emufuzz.oracle.rules.privilege import bitmap_unknown
from emufuzz.oracle.rules.view import MASK32, MASK64, Access, View

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_GP0: Final[Fault] = (GP_VECTOR, 0, None)
_SS0: Final[Fault] = (SS_VECTOR, 0, None)
_UD: Final[Fault] = (UD_VECTOR, None, None)
_SS_PREFIX: Final = 0x36
_FS_GS: Final = frozenset((0x64, 0x65))
_STACK_BASES: Final = frozenset((VCPU_REGS_RSP, VCPU_REGS_RBP))
_PLACE: Final = frozenset(("exception", "exception.error_code", "exception.address"))
#: SLDT and STR, which read their destination though they only write it.
_READS_TOO: Final = frozenset(("0f00/0", "0f00/1"))
#: Bytes of an FXSAVE image that KVM moves: without and with the XMM registers.
_FXSAVE_HEAD: Final = 160
_FXSAVE_XMM: Final = 128
_MXCSR: Final = 24
#: Bytes of ports that KVM reads ahead at most.
_READ_AHEAD: Final = 1024
#: What a lost batch leaves behind.
_BATCH: Final = frozenset(("rcx", "rdi", "mem"))
_UNALIGNED: Final = 15
#: Of the values that POPA pops, SP is the fourth.
_SLOT_OF_SP: Final = 3
#: Above these bits KVM takes no address of a VMCB.
_PHYSICAL_BITS: Final = 48


def _fields(differences: Sequence[Difference]) -> set[str]:
    return {difference.field for difference in differences}


def privilege_first(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """A privileged instruction at CPL > 0: KVM gives #GP(0) before it finds the encoding or state #UD."""
    return View(case).cpl > 0 and subject.exception == _GP0 and oracle.exception == _UD


def address_first(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """VMRUN, VMLOAD, VMSAVE without EFER.SVME: KVM looks at the address in RAX first."""
    wide = case.gpr[VCPU_REGS_RAX] >> _PHYSICAL_BITS
    disabled = not case.system.efer & EFER_SVME
    return bool(wide) and disabled and subject.exception == _GP0 and oracle.exception == _UD


def read_before_check(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """Read and write of a segment that can only be read: KVM reads first, so #PF comes before #GP or #SS.

    In real mode, too, if CS or SS is such a segment, with which hardware cannot enter the guest. A device is
    read in vain.
    """
    view, ours = View(case), subject.exception
    access = view.explicit
    if case.mode == "vm86" or view.long or access is None or ours is None:
        return False
    if oracle.exception != (_SS0 if access.reference.segment == VCPU_SREG_SS else _GP0):
        return False
    seg, reference = view.system.seg[access.reference.segment], access.reference
    readable = not seg.type & DESC_CODE or seg.type & DESC_READABLE
    if subject.leaf in _READS_TOO:
        access = access._replace(size=operand_size(case, subject.leaf))
    elif not reference.read:
        return False
    if not (reference.write and seg.p and readable and view.wrong_type(access)):
        return False
    if {difference.field for difference in differences} == {DEVICE_TRACE}:
        read, asked = trace_of(subject) or (), trace_of(oracle)
        once = sum(part.size for part in read) <= access.size and not any(part.write for part in read)
        return ours == oracle.exception and once and not asked
    code = PFERR_WRITE | (PFERR_USER if view.cpl == 3 else 0)
    return ours[:2] == (PF_VECTOR, code) and ours[2] in _places(view, access)


def _places(view: View, access: Access) -> set[int]:
    """Where an access may be #PF: at its first byte, and at the page end within it."""
    mask = MASK64 if view.long else MASK32
    end = access.linear + max(access.size, 1) - 1 & mask
    return {access.linear, end & ~PAGE_MASK if end & PAGE_MASK < access.size - 1 else access.linear}


def stack_override(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """64-bit mode, ES, CS, SS or DS prefix: it decides for KVM whether a non-canonical address is #SS(0).

    A processor ignores it, so that the base register decides.
    """
    view, override = View(case), prefix_facts(case).segments[-1:]
    access = view.explicit
    if not view.long or not override or override[0] in _FS_GS or access is None:
        return False
    linear, size = access.linear, max(access.size, 1)
    refused = not (view.canonical(linear) and view.canonical(linear + size - 1 & MASK64))
    parts = access.reference.parts
    stack = bool(parts) and parts[0].number in _STACK_BASES and parts[0].scale == 1
    ours, theirs = (_SS0 if override[0] == _SS_PREFIX else _GP0), (_SS0 if stack else _GP0)
    return refused and ours != theirs and (subject.exception, oracle.exception) == (ours, theirs)


def beyond_four_gigabytes(case: Case, subject: Outcome, _o: Outcome, _d: Sequence[Difference]) -> bool:
    """What is read or written for the system's sake outside of 64-bit mode: KVM goes on above 4 GiB."""
    view, fault = View(case), subject.exception
    access = view.explicit
    if view.long or access is None or fault is None:
        return False
    over = access.linear < 1 << 32 < access.linear + access.size
    return over and fault[0] == PF_VECTOR and fault[2] == 1 << 32


def limit_first(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """LGDT, LIDT: KVM reads the limit before it looks at where the base is, which the segment refuses."""
    view = View(case)
    access, fault = view.explicit, subject.exception
    if access is None or fault is None or oracle.exception != segment_fault(access):
        return False
    limit = access._replace(size=2)
    refused = view.segment_allows(limit) and not view.segment_allows(access)
    return refused and fault[0] == PF_VECTOR and fault[2] in _places(view, limit)


def compare_order(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """CMPS both of whose operands fault: KVM reads DS:rSI first, processors ES:rDI."""
    if not _fields(differences) <= _PLACE or subject.exception is None:
        return False
    if subject.pages or subject.system != case.system:
        return False
    view = View(msgspec.structs.replace(case, gpr=tuple(subject.gpr)))
    faults = {a.reference.parts[0].number: _fault(view, a) for a in view.accesses if a.reference.parts}
    source, destination = faults.get(VCPU_REGS_RSI), faults.get(VCPU_REGS_RDI)
    both = source is not None and destination is not None
    return both and subject.exception == source and oracle.exception == destination


def skipped_pop(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """POPA: KVM does not read the slot of SP, so that what lies there raises no #PF."""
    ours, theirs = subject.exception, oracle.exception
    if _fields(differences) != {"exception.address"} or ours is None or theirs is None:
        return False
    view, size = View(case), operand_size(case, subject.leaf)
    stack = view.system.seg[VCPU_SREG_SS]
    offset = case.gpr[VCPU_REGS_RSP] + _SLOT_OF_SP * size & (MASK32 if stack.db else 0xFFFF)
    slot = stack.base + offset & MASK32
    behind = slot + size & MASK32
    absent = slot if view.absent(slot) else behind - 1 & ~PAGE_MASK
    return view.absent(absent) and (ours[2], theirs[2]) == (behind, absent)


def _fault(view: View, access: Access) -> Fault | None:
    """What one read of flat memory raises by itself."""
    if not view.segment_allows(access):
        return segment_fault(access)
    code = PFERR_USER if view.cpl == 3 else 0
    end = access.linear + max(access.size, 1) - 1 & (MASK64 if view.long else MASK32)
    if view.absent(access.linear):
        return PF_VECTOR, code, access.linear
    return (PF_VECTOR, code, end & ~PAGE_MASK) if view.absent(end) else None


def wide_read(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """MOVSXD r16, m16: KVM reads 4 bytes, of which the last two may lie on a page that faults."""
    view, fault = View(case), subject.exception
    if operand_size(case, subject.leaf) != 2 or view.explicit is None or not _fields(differences) <= _PLACE:
        return False
    end = view.explicit.linear + 3 & MASK64
    beyond = end & PAGE_MASK in {0, 1}
    return fault is not None and fault[0] == PF_VECTOR and beyond and fault[2] == end & ~PAGE_MASK


def unreadable_bitmap(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """A port whose bit in the TSS is not in memory: KVM denies the access."""
    ours, theirs = subject.exception, oracle.exception
    if ours != _GP0 or theirs is None or theirs[0] != PF_VECTOR or subject.pages or subject.gpr != case.gpr:
        return False
    task = case.system.seg[VCPU_SREG_TR]
    inside = task.base <= (theirs[2] or 0) <= task.base + task.limit
    return inside and bitmap_unknown(View(case))


def short_image(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """FXSAVE, FXRSTOR: KVM moves the used part of the 512 bytes; the rest may not be accessible.

    What is accessible is treated as if there were no more: it must be aligned, MXCSR must be valid.
    """
    view, ours = View(case), subject.exception
    if view.explicit is None or not _beyond(view, view.explicit, oracle.exception):
        return False
    linear = view.explicit.linear
    if ours is None:
        return subject.rip == case.rip + (subject.length or 0) and tuple(subject.gpr) == case.gpr
    mxcsr = view.number(linear + _MXCSR, 4) or 0
    loads = subject.leaf == "0fae/1.mem" and bool(mxcsr >> 16)
    return ours == _GP0 and bool(linear & _UNALIGNED or loads)


def _beyond(view: View, image: Access, fault: Fault | None) -> bool:
    """A fault is due to those bytes of an FXSAVE image alone that KVM does not move."""
    moved = image._replace(size=_FXSAVE_HEAD + (_FXSAVE_XMM if view.system.cr4 & X86_CR4_OSFXSR else 0))
    if fault is None or not view.segment_allows(moved):
        return False
    if fault[0] == PF_VECTOR:
        return moved.size <= ((fault[2] or 0) - image.linear & MASK32) < image.size
    return fault == segment_fault(image) and not view.segment_allows(image)


def port_batch(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """REP INS upwards: KVM stores what it read ahead as one operand, which faults as a whole.

    A processor finishes the elements in front of the one that faults.
    """
    view = View(msgspec.structs.replace(case, gpr=tuple(subject.gpr)))
    if not view.insn.repeats or case.rflags & X86_EFLAGS_DF or not view.accesses or subject.exception is None:
        return False
    access = next(a for a in view.accesses if a.reference.write)
    room = PAGE_SIZE - (case.gpr[VCPU_REGS_RDI] & PAGE_MASK)
    batch = access._replace(size=min(room, _READ_AHEAD // access.size, view.count) * access.size)
    if not view.segment_allows(batch):
        return _fields(differences) == {"exception"} and subject.exception == segment_fault(access)
    lost = (oracle.gpr[VCPU_REGS_RDI] - subject.gpr[VCPU_REGS_RDI] & MASK32) // access.size
    finished = subject.gpr[VCPU_REGS_RCX] - oracle.gpr[VCPU_REGS_RCX] & MASK32
    stored = range(access.linear, access.linear + batch.size)
    ours, theirs = changed_bytes(case, subject), changed_bytes(case, oracle)
    if oracle.exception is None or subject.exception[::2] != oracle.exception[::2]:
        return False  # a difference of error codes is one of its own
    return (
        subject.exception[2] in stored
        and 0 < lost == finished
        and _fields(differences) <= _BATCH
        and all(at in stored for at in ours.keys() ^ theirs.keys())
    )
