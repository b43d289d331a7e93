"""Cases of the fuzzer with their memory taken apart: into devices, or into physical memory with tables.

What the flat subject does with the case as it was tells what the other form must come to.
"""

from __future__ import annotations

from random import Random

import msgspec

from emufuzz.arch.cr import (
    EFER_LMA,
    X86_CR0_PG,
    X86_CR4_LA57,
    X86_CR4_PAE,
    X86_CR4_PCIDE,
    X86_CR4_SMAP,
    X86_CR4_SMEP,
)
from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.case.devices import MMIO, PIO, DeviceAccess, trace_to_obj
from emufuzz.case.model import NO_MEMORY, PAGE_SHIFT, Memory, case_pages, code_address

ROOT = 0x1000000
FRAMES = range(0x2000, 0x2800)


def with_devices(case):
    """The case with RAM-like devices instead of all memory but that of its code, and their page numbers."""
    code = {code_address(case) + i >> PAGE_SHIFT for i in (0, len(case.code) - 1)}
    moved = [number for number in case.mem.pages if number not in code]
    kept = tuple((n << PAGE_SHIFT, page) for n, page in case.mem.pages.items() if n in code)
    devices = [
        {
            "kind": "mmio",
            "addr": n << PAGE_SHIFT,
            "size": 4096,
            "behaviour": "ram",
            "reads": case.mem.pages[n].hex(),
        }
        for n in moved
    ]
    return msgspec.structs.replace(case, mem=Memory(kept), extra={"devices": devices}), set(moved)


def expect_devices(case, outcome, moved):
    """The outcome of the flat subject as if the moved pages had been devices."""
    outcome.pages = {n: page for n, page in outcome.pages.items() if n not in moved}
    if outcome.exception is None:
        outcome.extra = {"device_trace": trace_to_obj(_trace(case, outcome, moved))}
    return outcome


def _trace(case, outcome, moved):
    """The accesses that the subject's events stand for, in pieces of 8 bytes and a page."""
    memory: dict[int, int] = {}
    trace: list[DeviceAccess] = []
    for kind, where, *rest in _without_retries(outcome.events):
        if kind == "in":
            size, count = rest[0], rest[1] if len(rest) > 1 else 1
            trace += [DeviceAccess(PIO, where, size, write=False, data=b"\xff" * size)] * count
        elif kind == "out":
            trace.append(DeviceAccess(PIO, where, len(rest[0]), write=True, data=rest[0]))
        elif kind == "read":
            data = bytes(_byte(case, memory, where + i) for i in range(rest[0]))
            trace += _pieces(where, data, moved, write=False)
        elif kind in {"write", "cmpxchg"}:
            data = rest[0] if kind == "write" else rest[1]
            trace += _pieces(where, data, moved, write=True)
            memory.update(enumerate(data, where))
    return trace


def _without_retries(events):
    """Events with an address; a write behind a compare-and-exchange there is that exchange once more."""
    return [
        event
        for event, following in zip(events, [*events[1:], ("",)], strict=True)
        if len(event) > 1 and not (event[0] == "cmpxchg" and following[:2] == ("write", event[1]))
    ]


def _byte(case, memory, at):
    page = case.mem.pages.get(at >> PAGE_SHIFT, bytes(4096))
    return memory.get(at, page[at & 4095])


def _pieces(where, data, moved, *, write):
    pieces = []
    while data:
        size = min(8, 4096 - (where & 4095), len(data))
        if where >> PAGE_SHIFT in moved:
            pieces.append(DeviceAccess(MMIO, where, size, write=write, data=bytes(data[:size])))
        where, data = where + size, data[size:]
    return pieces


def with_tables(case, rng: Random):
    """The case with its pages on random frames behind page tables, and page number -> frame.

    Half of the cases with 32-bit paging get PAE. Table pages are none of the frames.
    """
    system = case.system
    cr4 = system.cr4 & ~(X86_CR4_PCIDE | X86_CR4_SMEP | X86_CR4_SMAP)
    if not system.efer & EFER_LMA and rng.random() < 0.5:
        cr4 |= X86_CR4_PAE
    system = msgspec.structs.replace(system, cr3=ROOT, cr4=cr4)
    case = msgspec.structs.replace(case, system=system)
    pages = case_pages(case)
    frames = dict(zip(pages, rng.sample(FRAMES, len(pages)), strict=True))
    phys = [{"addr": at, "data": table.hex()} for at, table in _tables(system, frames).items()]
    phys += [{"addr": frames[n] << PAGE_SHIFT, "data": page.hex()} for n, page in pages.items()]
    return case, msgspec.structs.replace(case, mem=NO_MEMORY, extra={"phys": phys}), frames


def _tables(system, frames):
    """Tables that map page numbers to frames, writable for everyone."""
    long_mode, pae = bool(system.efer & EFER_LMA), bool(system.cr4 & X86_CR4_PAE)
    size, bits = (8, 9) if pae else (4, 10)
    levels = (5 if system.cr4 & X86_CR4_LA57 else 4) if long_mode else 3 if pae else 2
    tables = {ROOT: bytearray(4096)}
    for number, frame in frames.items():
        table = ROOT
        for level in range(levels, 0, -1):
            place = (number >> bits * (level - 1) & (1 << bits) - 1) * size
            entry = int.from_bytes(tables[table][place : place + size], "little")
            if level == 1:
                entry = frame << PAGE_SHIFT | 7
            elif not entry:
                top = pae and not long_mode and level == 3
                entry = ROOT + 4096 * len(tables) | (1 if top else 7)
                tables[entry & ~0xFFF] = bytearray(4096)
            tables[table][place : place + size] = entry.to_bytes(size, "little")
            table = entry & ~0xFFF
    return tables


def has_paging(case):
    """Whether the state says that paging is on."""
    return bool(case.system.cr0 & X86_CR0_PG)


def expect_tables(outcome, frames):
    """The outcome of the flat subject as if its pages had lain on `frames`; a #PF sets CR2."""
    outcome.pages = {frames[n]: page for n, page in outcome.pages.items()}
    if outcome.exception is not None and outcome.exception[0] == PF_VECTOR:
        outcome.system = msgspec.structs.replace(outcome.system, cr2=outcome.exception[2])
    return outcome


def without_tables(outcome):
    """An oracle's outcome without the accessed and dirty bits of the tables."""
    outcome.pages = {n: page for n, page in outcome.pages.items() if n in FRAMES}
    return outcome
