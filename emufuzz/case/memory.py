"""Guest memory from and to the exchange format, shared between the cases that have equal memory."""

from __future__ import annotations

from typing import Any, Final

from emufuzz.case.fields import MAX_MEMORY
from emufuzz.case.intern import Intern
from emufuzz.case.model import NO_MEMORY, PAGE_MASK, PAGE_SHIFT, ZERO_PAGE, Case, Memory, case_pages
from emufuzz.case.spec import FieldError

_MAX_PAGES = MAX_MEMORY >> PAGE_SHIFT
PHYSICAL_BITS: Final = 52  # width of a guest-physical address (SDM Vol. 3A 4.1.4 "MAXPHYADDR")

#: An equal Memory that was seen before, or this one: equal memories become one object.
intern_memory: Intern[Memory] = Intern()


def memory_of(entries: list[dict[str, Any]] | None) -> Memory:
    """The Memory of read `mem` entries.

    Raises:
        FieldError: an entry reaches beyond 2^64, or there are more than MAX_MEMORY bytes of pages.
    """
    if not entries:
        return NO_MEMORY
    memory = _laid_out(entries)
    _check_size(memory, "mem", 64)
    return intern_memory(memory)


def check_physical(entries: list[dict[str, Any]]) -> None:
    """Read `phys` entries; FieldError if one reaches beyond 2^52, or they are too many as in `memory_of`."""
    _check_size(_laid_out(entries), "phys", PHYSICAL_BITS)


def _laid_out(entries: list[dict[str, Any]]) -> Memory:
    return Memory(tuple([(entry["addr"], entry.get("data", b"")) for entry in entries]))


def _check_size(memory: Memory, name: str, width: int) -> None:
    pages = 0
    for index, (addr, data) in enumerate(memory.entries):
        last = addr + max(len(data), 1) - 1
        if last >> width:
            raise FieldError(f"reaches beyond the {width}-bit address space", f"{name}[{index}].data")
        pages += (last >> PAGE_SHIFT) - (addr >> PAGE_SHIFT) + 1
    # an upper bound, as entries may share pages; counted exactly only where that matters
    if pages > _MAX_PAGES and len(_page_numbers(memory)) > _MAX_PAGES:
        raise FieldError(f"more than {MAX_MEMORY >> 20} MiB of pages", name)


def _page_numbers(memory: Memory) -> set[int]:
    numbers: set[int] = set()
    for addr, data in memory.entries:
        numbers.update(range(addr >> PAGE_SHIFT, ((addr + max(len(data), 1) - 1) >> PAGE_SHIFT) + 1))
    return numbers


def changed_pages(case: Case, entries: list[dict[str, Any]] | None) -> dict[int, bytes]:
    """Page number -> new contents of the case's pages that the read entries of an outcome change."""
    if not entries:
        return {}
    before = case_pages(case)
    pages: dict[int, bytearray] = {}
    for index, entry in enumerate(entries):
        addr, data = entry["addr"], entry.get("data", b"")
        if (addr + max(len(data), 1) - 1) >> 64:
            raise FieldError("reaches beyond the 64-bit address space", f"mem[{index}].data")
        while data:
            pfn, offset = addr >> PAGE_SHIFT, addr & PAGE_MASK
            if pfn not in pages:
                pages[pfn] = bytearray(before.get(pfn, ZERO_PAGE))
            part = data[: PAGE_MASK + 1 - offset]
            pages[pfn][offset : offset + len(part)] = part
            addr, data = addr + len(part), data[len(part) :]
    changed = {pfn: bytes(page) for pfn, page in pages.items()}
    return {pfn: page for pfn, page in changed.items() if page != before.get(pfn, ZERO_PAGE)}


def mem_to_json(changes: list[tuple[int, bytes]]) -> str:
    """The JSON array of (address, bytes) runs."""
    return f"[{','.join([_entry_text(addr, data) for addr, data in changes])}]"


def _entry_text(addr: int, data: bytes) -> str:
    return f'{{"addr":"{addr:#x}","data":"{data.hex()}"}}'
