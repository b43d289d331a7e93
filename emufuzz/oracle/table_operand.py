"""Operands that KVM takes from the guest's page tables: the case with such an operand stands in.

A table in a read-only slot makes hardware exit when it walks the table, and reports the entry's address
(SDM Vol. 3C 28.3.3: with accessed and dirty flags for EPT that is a write). KVM emulates the instruction,
and takes the address for that of any operand with the same offset into its page, whatever the guest's
tables say (KVM: emulator_read_write_onepage, `gpa_val`). So an oracle gets a case in which such operands
lie in a copy of the table, and the subject must have done all of what the instruction does there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import msgspec

from emufuzz.arch.cr import X86_CR0_PG
from emufuzz.case.devices import trace_to_obj
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, Case, Outcome, code_address
from emufuzz.case.model import is_physical as has_physical_memory
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.instruction import CaseInstruction
from emufuzz.oracle.native_view import judge_case, kvm_of
from emufuzz.oracle.page_tables import READ_ONLY, Tables, with_tables

#: For each guess where KVM looks: the case with operands there, the outcome as if it had been run.
Elsewhere = Callable[[Case, Outcome], Iterator[tuple[Case, Outcome]]]

#: Member of `Outcome.extra` of outcomes that are made up here.
_MOVED: Final = "operands_moved"
_PATH: Final = "ept-violation"
_MASK64: Final = (1 << 64) - 1


def _read_only(case: Case, place: int) -> bool:
    return any(
        slot["base"] <= place < slot["base"] + slot["size"] and slot.get("flags", 0) & READ_ONLY
        for slot in kvm_of(case).get("memslots") or ()
    )


def table_operands(case: Case, subject: Outcome) -> Iterator[tuple[Case, Outcome]]:
    """Elsewhere: a case for each table entry that may have been the one that exited."""
    if case.path != _PATH or not has_physical_memory(case) or not case.system.cr0 & X86_CR0_PG:
        return
    if _MOVED in (subject.extra or {}):
        return
    if not any(slot.get("flags", 0) & READ_ONLY for slot in kvm_of(case).get("memslots") or ()):
        return
    view = judge_case(case)
    parts = list(_parts(view))
    tables = Tables(view)
    walked = dict.fromkeys(
        place for linear in (code_address(view), *parts) for _, place in tables.places(linear)
    )
    for place in walked:
        offset = place & PAGE_MASK
        pages = {part >> PAGE_SHIFT for part in parts if part & PAGE_MASK == offset}
        others = {part >> PAGE_SHIFT for part in parts if part & PAGE_MASK != offset}
        # What faults may not have come to the other accesses that such a page has.
        alone = not pages & others or subject.exception is not None
        if pages and alone and _read_only(case, place):
            yield _moved(case, subject, place >> PAGE_SHIFT, pages)


def _parts(view: Case) -> Iterator[int]:
    """The linear addresses at which the instruction's accesses begin, in each page."""
    mask = _MASK64 if view.mode == "prot64" else 0xFFFFFFFF
    for access in CaseInstruction(view).accesses:
        yield access.linear
        last = access.linear + max(access.size, 1) - 1
        for page in range((access.linear >> PAGE_SHIFT) + 1, (last >> PAGE_SHIFT) + 1):
            yield page << PAGE_SHIFT & mask


def _moved(case: Case, subject: Outcome, table: int, pages: set[int]) -> tuple[Case, Outcome]:
    """The case whose linear `pages` are a copy of page `table`, and the outcome with accesses to that."""
    tables = Tables(case)
    frame = tables.new_page(bytes(tables.pages[table]))
    for number in pages:
        tables.map(number << PAGE_SHIFT, frame)
    other = msgspec.structs.replace(case, extra=with_tables(case, tables, read_only=frame))
    return other, _with_tables(subject, tables, table, frame)


def _with_tables(subject: Outcome, tables: Tables, table: int, frame: int) -> Outcome:
    """The outcome with the other tables where it has changed their pages, and accesses to the copy."""
    pages = {number: bytearray(page) for number, page in subject.pages.items()}
    for place, data in tables.changed.items():
        if place >> PAGE_SHIFT in pages:
            pages[place >> PAGE_SHIFT][place & PAGE_MASK : (place & PAGE_MASK) + len(data)] = data
    trace = [
        access._replace(addr=frame << PAGE_SHIFT | access.addr & PAGE_MASK)
        if access.addr >> PAGE_SHIFT == table
        else access
        for access in trace_of(subject) or ()
    ]
    return msgspec.structs.replace(
        subject,
        pages={number: bytes(page) for number, page in pages.items()},
        extra={**(subject.extra or {}), DEVICE_TRACE: trace_to_obj(trace), _MOVED: True},
    )
