"""Table entries with addresses beyond the guest's MAXPHYADDR, whose upper bits are reserved for it.

SDM Vol. 3A 4.1.4: physical addresses have as many bits as CPUID says. The processor that runs an oracle
has another number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from emufuzz.arch.exceptions import PF_VECTOR, PFERR_RSVD
from emufuzz.case.model import PAGE_SIZE, Case, Outcome, case_memory, code_address, is_physical
from emufuzz.case.translate import walk
from emufuzz.oracle.instruction import CaseInstruction

_ADDRESS_END: Final = 52
_MASK32: Final = 0xFFFFFFFF
_MASK64: Final = (1 << 64) - 1


def guest_width(case: Case) -> int | None:
    """The MAXPHYADDR that the case gives the guest, if it gives one and the guest has tables of its own."""
    width: int | None = ((case.extra or {}).get("kvm") or {}).get("cpuid", {}).get("maxphyaddr")
    return width if is_physical(case) else None


def beyond_guest_width(instruction: CaseInstruction) -> bool:
    """Whether an entry on the way to an operand or the code has a bit that MAXPHYADDR reserves."""
    case = instruction.case
    width = guest_width(case)
    if width is None:
        return False
    reserved = (1 << _ADDRESS_END) - (1 << width)
    return any(entry & reserved for linear in _pages(instruction) for entry in _entries(case, linear))


def reserved_above(instruction: CaseInstruction, outcome: Outcome, bits: int) -> bool:
    """Whether a #PF for a reserved bit is due to an entry whose address has more bits than an engine's."""
    fault, case = outcome.exception, instruction.case
    if not is_physical(case) or fault is None or fault[0] != PF_VECTOR or not (fault[1] or 0) & PFERR_RSVD:
        return False
    above = (1 << _ADDRESS_END) - (1 << bits)
    pages = {**case_memory(case).pages, **outcome.pages}  # its own stores may have changed the entry
    return any(entry & above for entry in _entries(case, fault[2] or 0, pages))


def _entries(case: Case, linear: int, pages: Mapping[int, bytes] | None = None) -> list[int]:
    system = case.system
    known = case_memory(case).pages if pages is None else pages
    return walk(known, system.cr0, system.cr3, system.cr4, system.efer, linear)[0]


def _pages(instruction: CaseInstruction) -> Iterator[int]:
    """An address in each page of the operands and the code."""
    case = instruction.case
    mask = _MASK64 if case.mode == "prot64" else _MASK32
    spans = [(access.linear, access.size) for access in instruction.accesses]
    for start, size in ((code_address(case), len(case.code)), *spans):
        for offset in (*range(0, max(size, 1), PAGE_SIZE), max(size, 1) - 1):
            yield start + offset & mask
