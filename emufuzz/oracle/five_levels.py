"""Accesses that go on beyond the canonical addresses: the case with wider addresses stands in.

KVM looks at the address of an operand's first byte alone (quirk 1), and then takes what follows from
behind the end of the lower half, by bits 47:0. With linear addresses of 57 bits (SDM Vol. 3A 4.5.1) those
addresses are canonical, and bits 47:0 lead through the same tables. So an oracle gets a case with CR4.LA57,
and the subject must have done all of what the instruction does there.

Of a repeated instruction that stops behind the end, since there the first byte is not canonical, the
iterations in front stand in.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec

from emufuzz.arch.cr import X86_CR4_LA57
from emufuzz.arch.exceptions import GP_VECTOR, SS_VECTOR
from emufuzz.arch.regs import VCPU_REGS_RCX, VCPU_REGS_RDI, VCPU_REGS_RSI
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, is_physical
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.operands import prefix_facts
from emufuzz.oracle.page_tables import Tables, with_tables

#: The first address that is not canonical with 48 bits.
END: Final = 1 << 47
_REFUSED: Final = ((GP_VECTOR, 0, None), (SS_VECTOR, 0, None))
_ENTRY: Final = 8
#: Entries of the top table that lead to both halves of the 48-bit addresses.
_HALVES: Final = (0, 511)
#: P, RW, US and A.
_OPEN: Final = 0x27
_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1


def wider_addresses(case: Case, subject: Outcome) -> Iterator[tuple[Case, Outcome]]:
    """Elsewhere: the case with addresses of 57 bits if an access begins below 2**47 and ends above."""
    view = judge_case(case)
    if case.mode != "prot64" or case.system.cr4 & X86_CR4_LA57:
        return
    instruction = CaseInstruction(view)
    if not any(a.linear < END < a.linear + a.size for a in instruction.accesses):
        return
    repeats = instruction.string_opcode and bool(prefix_facts(view).rep)
    if subject.exception not in _REFUSED:
        yield _widened(case, subject)
    elif repeats:
        for front, ended in _iterations(case, subject):
            yield _widened(front, ended)


def _iterations(case: Case, subject: Outcome) -> Iterator[tuple[Case, Outcome]]:
    """The case of those iterations alone that were done, and how it ends: behind the instruction, or at it.

    Where KVM looks for events it leaves the instruction with RCX = 0 to be found finished later.
    """
    mask = _MASK32 if prefix_facts(judge_case(case)).small_ad else _MASK64
    left = subject.gpr[VCPU_REGS_RCX] & mask
    done = (case.gpr[VCPU_REGS_RCX] & mask) - left
    beyond = any(subject.gpr[nr] >= END > case.gpr[nr] for nr in (VCPU_REGS_RSI, VCPU_REGS_RDI))
    view = judge_case(case)
    if done <= 0 or not left or not beyond or subject.rip != view.rip:
        return
    length = int(CaseInstruction(view).decode(lax=True).len)
    for rip, flags in ((view.rip + length & _MASK64, 0), (view.rip, X86_EFLAGS_RF)):
        ended = msgspec.structs.replace(
            subject, gpr=_with_rcx(subject.gpr, 0), rip=rip, rflags=subject.rflags & ~X86_EFLAGS_RF | flags,
            exception=None, rc="continue",
        )  # fmt: skip
        yield msgspec.structs.replace(case, gpr=_with_rcx(case.gpr, done)), ended


def _with_rcx(gpr: tuple[int, ...], rcx: int) -> tuple[int, ...]:
    return (gpr[0], rcx, *gpr[VCPU_REGS_RCX + 1 :])


def _widened(case: Case, subject: Outcome) -> tuple[Case, Outcome]:
    """CR4.LA57 on both sides; with physical memory a table on top, whose halves lead to the old one."""
    system = case.system
    changes = {"cr4": system.cr4 | X86_CR4_LA57, "cr3": system.cr3}
    extra = case.extra
    if is_physical(case):
        tables = Tables(case)
        root = bytearray(PAGE_MASK + 1)
        for place in _HALVES:
            entry = system.cr3 & ~PAGE_MASK | _OPEN
            root[place * _ENTRY : (place + 1) * _ENTRY] = entry.to_bytes(_ENTRY, "little")
        changes["cr3"] = tables.new_page(bytes(root)) << PAGE_SHIFT | system.cr3 & PAGE_MASK
        extra = with_tables(case, tables)
    other = msgspec.structs.replace(case, system=msgspec.structs.replace(system, **changes), extra=extra)
    return other, msgspec.structs.replace(subject, system=msgspec.structs.replace(subject.system, **changes))
