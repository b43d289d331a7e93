"""Rules about what KVM stores over the end of a page, of which one side may be a device.

Each works out memory and devices as KVM leaves them, and wants nothing else to be different.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from emufuzz.arch.exceptions import PF_VECTOR, PFERR_PRESENT, PFERR_RSVD
from emufuzz.arch.regs import (
    VCPU_REGS_RCX,
    VCPU_REGS_RDI,
    VCPU_REGS_RDX,
    VCPU_SREG_LDTR,
    VCPU_SREG_TR,
)
from emufuzz.arch.rflags import X86_EFLAGS_DF, X86_EFLAGS_RF
from emufuzz.case.devices import MMIO
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, PAGE_SIZE, Case, Outcome, is_physical
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.machine_rules import is_walk, port_read_ahead
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.operands import modrm, operand_size, place_of, prefix_facts
from emufuzz.oracle.page_tables import Tables
from emufuzz.oracle.places import TRAP, Places

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference

_WIDE: Final = 8
_SELECTOR: Final = 2
_SPECIAL: Final = {"0f00/0": VCPU_SREG_LDTR, "0f00/1": VCPU_SREG_TR}
_MOV: Final = "8c"
_MASK32: Final = 0xFFFFFFFF
#: Bytes that KVM reads ahead from a port at most.
_READ_AHEAD: Final = 1024
#: How much of an image LGDT and LIDT with a 16-bit operand read, in KVM and elsewhere.
_SHORT_IMAGE: Final = 5
_HOLE: Final = PFERR_PRESENT | PFERR_RSVD


def selector_in_pages(case: Case, subject: Outcome, oracle: Outcome, _: Sequence[Difference]) -> bool:
    """MOV, SLDT, STR of a selector to memory: 8 bytes with REX.W; SLDT and STR read their operand first."""
    view = judge_case(case)
    accesses = CaseInstruction(view).accesses
    if not accesses or oracle.exception not in {None, TRAP}:
        return False
    linear, size = accesses[0].linear, operand_size(view, subject.leaf)
    number = _SPECIAL.get(subject.leaf, modrm(view)[1] & 7)
    selector = view.system.seg[number].sel
    places = Places(case, oracle.pages)
    try:
        if subject.leaf != _MOV:
            places.read(linear, size)
        places.write(linear, selector.to_bytes(_WIDE if size == _WIDE else _SELECTOR, "little"))
    except KeyError:
        return False
    return _only_walks(case, subject, places.seen(oracle), (linear, linear + size - 1))


def _only_walks(case: Case, subject: Outcome, expected: Outcome, operands: Sequence[int]) -> bool:
    """The subject did what is expected, up to bits that walks to the operands set."""
    from emufuzz.oracle.compare import compare  # noqa: PLC0415 - which looks for quirks

    view = judge_case(case)
    entries = {place for linear in operands for _, place in Tables(view).places(linear)}
    return all(
        difference.at in entries and is_walk(view, difference)
        for difference in compare(case, subject, expected)
    )


def batch_over_4g(case: Case, subject: Outcome, _oracle: Outcome, __: Sequence[Difference]) -> bool:
    """REP INS with 32-bit addresses in 64-bit mode: what was read ahead is stored as one operand.

    That goes on above 4 GiB, where single elements would go on at 0.
    """
    from emufuzz.oracle.compare import compare  # noqa: PLC0415 - which looks for quirks

    view = judge_case(case)
    facts, size = prefix_facts(view), 1 if subject.leaf == "6c" else min(operand_size(view, subject.leaf), 4)
    start, count = (view.gpr[nr] & _MASK32 for nr in (VCPU_REGS_RDI, VCPU_REGS_RCX))
    ahead = min(PAGE_SIZE - (start & PAGE_MASK), _READ_AHEAD // size, count)
    plain = case.mode == "prot64" and facts.rep and facts.small_ad and not case.rflags & X86_EFLAGS_DF
    if not plain or start + ahead * size <= _MASK32 + 1 or subject.exception is not None:
        return False
    places = Places(case, {n: page for n, page in subject.pages.items() if _is_table(case, n)})
    try:
        places.write(start, places.read_port(view.gpr[VCPU_REGS_RDX] & 0xFFFF, size, ahead))
    except KeyError:
        return False
    expected = places.seen(_after(view, subject, ahead, size, count))
    return not compare(case, subject, expected)


def _is_table(case: Case, number: int) -> bool:
    """A page of physical memory may be a page table, whose walk bits are not looked at here."""
    return is_physical(case) and any(
        place >> PAGE_SHIFT == number
        for linear in (case.rip, case.gpr[VCPU_REGS_RDI] & _MASK32)
        for _, place in Tables(case).places(linear)
    )


def _after(view: Case, subject: Outcome, ahead: int, size: int, count: int) -> Outcome:
    """The registers after so many elements; with RF as long as there are more."""
    gpr = list(view.gpr)
    gpr[VCPU_REGS_RCX] = count - ahead
    gpr[VCPU_REGS_RDI] = (view.gpr[VCPU_REGS_RDI] & _MASK32) + ahead * size & _MASK32
    going_on = subject.rip == view.rip
    rip = view.rip if going_on else view.rip + int(CaseInstruction(view).decode(lax=True).len)
    rflags = view.rflags & ~X86_EFLAGS_RF | (X86_EFLAGS_RF if going_on else 0)
    return msgspec.structs.replace(
        subject, gpr=tuple(gpr), rip=rip, rflags=rflags, system=view.system, pages={}
    )


def table_last_byte(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """LGDT, LIDT with a 16-bit operand read five bytes; the sixth, which does not count, is a device's."""
    accesses = CaseInstruction(case).accesses
    if not accesses or case.mode == "prot64" or operand_size(case, subject.leaf) != _SELECTOR:
        return False
    seen = [(access.kind, access.addr, access.size, access.write) for access in trace_of(oracle) or ()]
    last = accesses[0].linear + _SHORT_IMAGE & _MASK32
    return (
        {difference.field for difference in differences} == {DEVICE_TRACE}
        and not trace_of(subject)
        and seen == [(MMIO, place_of(case, last), 1, False)]
    )


def table_in_hole(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """A page table where no memory is: a processor reads ones there, KVM's walk ends as at no entry.

    INS may have read its port ahead.
    """
    ours, theirs = subject.exception, oracle.exception
    codes = [d for d in differences if d.field == "exception.error_code"]
    rest = [d for d in differences if d not in codes]
    if ours is None or theirs is None or ours[0] != PF_VECTOR or not codes or not is_physical(case):
        return False
    if theirs[1] != (ours[1] or 0) | _HOLE or (ours[1] or 0) & _HOLE:
        return False
    if rest and not (subject.leaf in {"6c", "6d"} and port_read_ahead(case, subject, oracle, rest)):
        return False
    tables = Tables(judge_case(case))
    tables.pages.update({number: bytearray(page) for number, page in subject.pages.items()})
    *_, (_level, last) = tables.places(ours[2] or 0)
    return not Places(case).readable(last >> PAGE_SHIFT)


def unchecked_front(case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]) -> bool:
    """What reads MMIO and writes to it, over the end of a page: KVM looks at the second page alone."""
    ours, theirs = subject.exception, oracle.exception
    if {d.field for d in differences} != {"exception.address"} or ours is None or theirs is None:
        return False
    if not is_physical(case) or ours[:2] != theirs[:2]:
        return False
    front = [
        access for access in CaseInstruction(case).accesses
        if access.write and access.linear == theirs[2] and access.linear >> PAGE_SHIFT
        < access.linear + access.size - 1 >> PAGE_SHIFT
    ]  # fmt: skip
    known = {access.addr for access in trace_of(subject) or () if access.kind == MMIO and not access.write}
    return any(
        place_of(case, access.linear) in known and ours[2] == (access.linear | PAGE_MASK) + 1
        for access in front
    )
