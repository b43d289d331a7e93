"""The rules behind the quirks that only checking oracles see: the rules of the SDM, and real processors.

Unicorn shares these departures or is silent about them. Each rule works out what exactly KVM does with
the case; `check_faults` has those that are about which fault comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.arch.cr import X86_CR0_ET
from emufuzz.arch.exceptions import (
    DB_VECTOR,
    DE_VECTOR,
    GP_VECTOR,
    MF_VECTOR,
    NM_VECTOR,
    PF_VECTOR,
    UD_VECTOR,
)
from emufuzz.arch.regs import GPR_NAMES, VCPU_REGS_RSP, VCPU_SREG_LDTR, VCPU_SREG_TR
from emufuzz.arch.rflags import X86_EFLAGS_IF, X86_EFLAGS_RF, X86_EFLAGS_ZF
from emufuzz.case.model import PAGE_MASK, Case, Outcome
from emufuzz.oracle.operands import changed_bytes, modrm, operand_size, place_of, prefix_facts
from emufuzz.oracle.quirk_rules import split_write
from emufuzz.oracle.rules.memory import segment_fault
from emufuzz.oracle.rules.view import MASK32, MASK64, View

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

#: Bit of the interruptibility state: blocked by STI.
_BLOCKED_BY_STI: Final = 2
#: All of the x87 registers are valid, and TOP is 0, once an MMX register was looked at.
_ALL_VALID: Final = 0xFF
_TOP: Final = 7 << 11
#: Exceptions that come before an operand is looked at.
_NOT_STARTED: Final = frozenset((UD_VECTOR, NM_VECTOR, MF_VECTOR))
_WIDE: Final = 8
_REGISTER: Final = 3
_VECTOR: Final = 16
_DIVIDES: Final = frozenset(("f6/6", "f6/7", "f7/6", "f7/7"))
_REP: Final = 0xF3
_CR0_BITS: Final = 0xE005003F


def _fields(differences: Sequence[Difference]) -> set[str]:
    return {difference.field for difference in differences}


def shadow_of_sti(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """STI with IF set already: KVM blocks interrupts for another instruction."""
    return (
        _fields(differences) == {"interruptibility"}
        and subject.exception in {None, (DB_VECTOR, None, None)}
        and bool(case.rflags & subject.rflags & X86_EFLAGS_IF)
        and subject.interruptibility == _BLOCKED_BY_STI
    )


def stored_selector(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """MOV m, Sreg, SLDT, STR with REX.W: the selector is stored as 8 bytes, whatever is behind it."""
    view = View(case)
    wide = modrm(case)[0] != 3 and operand_size(case, subject.leaf) == _WIDE
    if _fields(differences) != {"mem"} or not wide or view.explicit is None:
        return False
    number = {"0f00/0": VCPU_SREG_LDTR, "0f00/1": VCPU_SREG_TR}.get(subject.leaf, modrm(case)[1])
    image = case.system.seg[number].sel.to_bytes(_WIDE, "little")
    at = view.explicit.linear
    stored = {place_of(case, at + i & MASK64): byte for i, byte in enumerate(image)}
    changed = changed_bytes(case, subject)
    return _completed(case, subject) and all(stored.get(place) == byte for place, byte in changed.items())


def _completed(case: Case, subject: Outcome) -> bool:
    """The next instruction follows, or a single-step trap, with all registers and flags as they were."""
    return (
        subject.exception in {None, (DB_VECTOR, None, None)}
        and subject.rip == case.rip + (subject.length or 0)
        and subject.rflags == case.rflags & ~X86_EFLAGS_RF
        and tuple(subject.gpr) == case.gpr
    )


def scan_of_zero(case: Case, subject: Outcome, _: Outcome, differences: Sequence[Difference]) -> bool:
    """F3 BSF, BSR of 0 with 32 bits: KVM leaves all of the destination, TZCNT and LZCNT would clear half."""
    return (
        _fields(differences) == {GPR_NAMES[modrm(case)[1]]}
        and prefix_facts(case).rep == _REP
        and operand_size(case, subject.leaf) == 4
        and subject.exception is None
        and bool(subject.rflags & X86_EFLAGS_ZF)
        and tuple(subject.gpr) == case.gpr
    )


def refused_exchange(
    case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """CMPXCHG r32, r32 that finds another value: KVM writes the destination, and clears its upper half."""
    mode, _, number = modrm(case)
    return (
        _fields(differences) == {GPR_NAMES[number]}
        and mode == _REGISTER
        and operand_size(case, subject.leaf) == 4
        and subject.exception is None
        and not subject.rflags & X86_EFLAGS_ZF
        and subject.gpr[number] == case.gpr[number] & MASK32
        and oracle.gpr[number] == case.gpr[number]
    )


def dropped_bits(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV to CR0 or CR4 in 64-bit mode: bits 63:32 are dropped instead of #GP(0)."""
    number, register = modrm(case)[1:]
    value, system = case.gpr[register], case.system
    if number == 4:
        loaded = msgspec.structs.replace(system, cr4=value & MASK32)
    else:
        loaded = msgspec.structs.replace(system, cr0=value & _CR0_BITS | X86_CR0_ET)
    refused = oracle.exception == (GP_VECTOR, 0, None) and number in {0, 4}
    return refused and bool(value >> 32) and subject.system == loaded and _idle(case, subject)


def ignored_alias(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV to DR4 or DR5 with bits 63:32: KVM refuses, and does not look at its own refusal."""
    number, register = modrm(case)[1:]
    return (
        number in {4, 5}
        and oracle.exception == (GP_VECTOR, 0, None)
        and bool(case.gpr[register] >> 32)
        and subject.system == case.system
        and _idle(case, subject)
    )


def _idle(case: Case, subject: Outcome) -> bool:
    """The next instruction follows, and memory is as it was, too."""
    return not subject.pages and _completed(case, subject)


def mmx_tags(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """MOVQ m64, mm that faults: KVM has read the register, which makes all x87 registers valid."""
    fault, fpu = subject.exception, subject.system.fpu
    memory = [difference for difference in differences if difference.field == "mem"]
    fields = _fields(differences) - {"mem"}
    if fault is None or fault[0] in _NOT_STARTED or not fields or not fields <= {"fpu.ftw", "fpu.fsw"}:
        return False
    read = fpu.ftw == _ALL_VALID and fpu.fsw == case.system.fpu.fsw & ~_TOP
    return read and (not memory or split_write(case, subject, oracle, memory))


def wrapped(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """An access over the end of a 4 GiB segment: KVM goes on at its beginning, processors refuse.

    What such an access yields nobody else can say; all else that it must not change is looked at.
    """
    view = View(msgspec.structs.replace(case, gpr=tuple(oracle.gpr)))  # the iteration that is refused
    refused = [a for a in view.accesses if _over_the_end(view, a.reference.segment, a.offset, a.size)]
    if _fields(differences) != {"exception"} or not refused or oracle.exception is None:
        return False
    if oracle.exception not in {segment_fault(access) for access in refused}:
        return False
    ours = subject.exception
    if ours is None:
        return _only_operands(view, case, subject)
    if ours == (DE_VECTOR, None, None):
        return subject.leaf in _DIVIDES
    if ours == (GP_VECTOR, 0, None):  # the check of 16-byte operands, which comes behind that of the segment
        return any(access.size >= _VECTOR and access.linear & _VECTOR - 1 for access in refused)
    return ours[0] == PF_VECTOR and any(
        (ours[2] or 0) in {a.linear, a.linear + a.size - 1 & MASK32 & ~PAGE_MASK} for a in refused
    )


def _over_the_end(view: View, segment: int, offset: int, size: int) -> bool:
    """An access of a segment that ends at 4 GiB runs over that end."""
    seg = view.system.seg[segment]
    ends = seg.limit == MASK32 or (seg.type & 0xC == 4 and seg.db and offset > seg.limit)
    return not view.long and bool(seg.p and ends) and offset + size > 1 << 32


def _only_operands(view: View, case: Case, subject: Outcome) -> bool:
    """Nothing has changed but what the instruction writes: its registers, the bytes of its operands."""
    written = view.insn.written | (1 << VCPU_REGS_RSP if view.insn.lax.is_stack_instruction else 0)
    if any(
        a != b and not written >> n & 1 for n, (a, b) in enumerate(zip(case.gpr, subject.gpr, strict=True))
    ):
        return False
    touched = {
        place_of(case, a.linear + i & MASK32)
        for a in view.accesses
        if a.reference.write
        for i in range(a.size)
    }
    return changed_bytes(case, subject).keys() <= touched
