"""Case (machine state before an instruction) and Outcome (after it) as values.

The exchange form of both is docs/case-format.md; `emufuzz.case.json` converts without loss.
What ordinary instructions leave alone (segments, control, debug and model-specific registers,
FPU) sits in one shared, immutable `System`, so that a batch of cases and its outcomes refer to
the same object, and engines may keep what they derive from it. Guest memory likewise: `Memory`
is immutable and shared, an outcome holds only the pages that changed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, Final, TypeAlias

import msgspec

from emufuzz.case.translate import translate

PAGE_SIZE: Final = 4096
PAGE_SHIFT: Final = 12
PAGE_MASK: Final = PAGE_SIZE - 1
ZERO_PAGE: Final = bytes(PAGE_SIZE)
_CHUNK: Final = 128  # bytes of a page that are compared at once


class Segment(msgspec.Struct, frozen=True, gc=False):
    """A segment register with its hidden part; `limit` in bytes. All zero = unusable (p = 0)."""

    sel: int = 0
    base: int = 0
    limit: int = 0
    type: int = 0
    s: int = 0
    dpl: int = 0
    p: int = 0
    avl: int = 0
    l: int = 0  # noqa: E741 - the architectural name of the bit
    db: int = 0
    g: int = 0


UNUSABLE: Final = Segment()


class Fpu(msgspec.Struct, frozen=True):
    """x87/MMX/SSE state. `ftw` is the abridged tag byte (0 = all empty); 16 XMM, 8 MM registers."""

    fcw: int = 0x37F
    fsw: int = 0
    ftw: int = 0
    mxcsr: int = 0x1F80
    xmm: tuple[int, ...] = (0,) * 16
    mm: tuple[int, ...] = (0,) * 8


DEFAULT_FPU: Final = Fpu()


class TableRegister(msgspec.Struct, frozen=True, gc=False):
    """GDTR or IDTR: linear base and limit in bytes."""

    base: int = 0
    limit: int = 0


class System(msgspec.Struct, frozen=True, dict=True):
    """Everything but GPRs, RIP, RFLAGS and memory; `seg` in VCPU_SREG_* order, `msr` sorted pairs."""

    seg: tuple[Segment, ...] = (UNUSABLE,) * 8
    gdtr: TableRegister = TableRegister()
    idtr: TableRegister = TableRegister()
    cr0: int = 0
    cr2: int = 0
    cr3: int = 0
    cr4: int = 0
    cr8: int = 0
    efer: int = 0
    xcr0: int = 0
    dr: tuple[int, ...] = (0,) * 8
    msr: tuple[tuple[int, int], ...] = ()
    fpu: Fpu = DEFAULT_FPU


class Memory(msgspec.Struct, frozen=True, dict=True):
    """Flat memory: `entries` of (linear address, bytes).

    A page exists if an entry starts in it or covers it. Bytes not covered are zero; where
    entries overlap the later one wins. Empty bytes make a page of zeros.
    """

    entries: tuple[tuple[int, bytes], ...] = ()

    @cached_property
    def pages(self) -> dict[int, bytes]:
        """Page number (address >> 12) -> its 4096 bytes."""
        build: dict[int, bytearray] = {}
        for addr, data in self.entries:
            _lay(build, addr, data)
        return {pfn: bytes(page) for pfn, page in build.items()}


def _lay(pages: dict[int, bytearray], addr: int, data: bytes) -> None:
    """Write `data` at `addr`, making the pages it starts in and covers."""
    done = 0
    while True:
        pfn, offset = divmod(addr + done, PAGE_SIZE)
        page = pages.setdefault(pfn, bytearray(PAGE_SIZE))
        part = data[done : done + PAGE_SIZE - offset]
        page[offset : offset + len(part)] = part
        done += len(part)
        if done >= len(data):
            return


NO_MEMORY: Final = Memory()


class Case(msgspec.Struct, frozen=True, gc=False):
    """One machine state before an instruction (docs/case-format.md, Case).

    `gpr` has 16 values in VCPU_REGS_* order. `extra` holds the fields that only the KVM model
    reads (`phys`, `devices`, `kvm`, `callbacks`), as decoded JSON.
    """

    id: str
    mode: str
    code: bytes
    gpr: tuple[int, ...]
    rip: int
    rflags: int
    system: System
    mem: Memory = NO_MEMORY
    count: int = 1
    port_in: bytes = b""
    vendor: str = "intel"
    emul_type: int = 0
    single: int = 0
    path: str | None = None
    extra: dict[str, Any] | None = None


#: vector, error code (None = none is pushed), faulting linear address (None = not a #PF).
Fault: TypeAlias = tuple[int, int | None, int | None]
#: One callback call, as in docs/case-format.md with plain ints and bytes: ("read", addr, size) ...
Event: TypeAlias = tuple[Any, ...]


class Outcome(msgspec.Struct, gc=False):
    """One machine state after an instruction, from a subject or an oracle.

    `system` is the Case's own object when nothing in it changed. `pages` maps page numbers to
    the whole new contents of each page that differs from the case's memory (physical ones with `phys`).
    `leaf` and `reason` (why a subject cannot handle it) stay inside emufuzz.
    `unchecked` lists (field or "all", gap id) that an oracle does not vouch for.
    `extra` holds what an exit path adds (`exits`, `device_trace` ...), as decoded JSON.
    """

    id: str
    gpr: tuple[int, ...]
    rip: int
    rflags: int
    system: System
    rc: str = "continue"
    decode_rc: str = "ok"
    length: int | None = None
    exception: Fault | None = None
    interruptibility: int = 0
    restarts: int = 0
    pages: dict[int, bytes] = {}
    events: list[Event] | tuple[Event, ...] = ()
    unchecked: tuple[tuple[str, str], ...] = ()
    leaf: str = ""
    reason: str = ""
    crash: str = ""
    hang: bool = False
    extra: dict[str, Any] | None = None


def code_address(case: Case) -> int:
    """Linear address of the case's first code byte: RIP in 64-bit mode, else CS.base + RIP mod 2^32."""
    if case.mode == "prot64":
        return case.rip
    return (case.system.seg[1].base + case.rip) & 0xFFFFFFFF


def is_physical(case: Case) -> bool:
    """Whether the case's memory is guest-physical (`phys`)."""
    return case.extra is not None and "phys" in case.extra


#: The `phys` fields that were read last: id -> the field, kept so that the id stays its own, and its Memory.
_physical: Final[dict[int, tuple[Any, Memory]]] = {}
_PHYSICAL_KEPT: Final = 64


def case_memory(case: Case) -> Memory:
    """The case's `mem`, or its `phys`."""
    if not is_physical(case):
        return case.mem
    field = (case.extra or {})["phys"]
    known = _physical.get(id(field))
    if known is None:
        entries = [(_address(entry["addr"]), bytes.fromhex(entry.get("data", ""))) for entry in field]
        known = (field, Memory(tuple(entries)))
        if len(_physical) >= _PHYSICAL_KEPT:
            _physical.pop(next(iter(_physical)))
        _physical[id(field)] = known
    return known[1]


def _address(value: str | int) -> int:
    return int(value, 16) if isinstance(value, str) else value


def case_pages(case: Case) -> dict[int, bytes]:
    """All pages of a case, its code laid over its memory: page number -> 4096 bytes.

    Page numbers are linear, or physical with `phys`.
    """
    pages = dict(case_memory(case).pages)
    laid: dict[int, bytearray] = {}
    for address, part in code_parts(case):
        for pfn in _pages_of(address, len(part)):
            laid.setdefault(pfn, bytearray(pages.get(pfn, ZERO_PAGE)))
        _lay(laid, address, part)
    pages.update((pfn, bytes(page)) for pfn, page in laid.items())
    return pages


def code_parts(case: Case) -> list[tuple[int, bytes]]:
    """Where the case's code is laid, as (address, bytes).

    In physical memory each page's part lies where the tables put it; what they do not map is not laid.
    """
    address = code_address(case)
    if not is_physical(case):
        return [(address, case.code)]
    system, pages = case.system, case_memory(case).pages
    parts, done = [], 0
    mask = (1 << 64) - 1 if case.mode == "prot64" else 0xFFFFFFFF
    while done < len(case.code):
        linear = address + done & mask
        size = PAGE_SIZE - (linear & PAGE_MASK)
        physical = translate(pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
        if physical is not None:
            parts.append((physical, case.code[done : done + size]))
        done += size
    return parts


def _pages_of(addr: int, size: int) -> range:
    return range(addr >> PAGE_SHIFT, ((addr + max(size, 1) - 1) >> PAGE_SHIFT) + 1)


def memory_changes(case: Case, outcome: Outcome) -> list[tuple[int, bytes]]:
    """The bytes an outcome changed, as maximal (address, bytes) runs within pages, in order.

    Addresses are linear, or physical with `phys`.
    """
    if not outcome.pages:
        return []
    before = case_pages(case)
    changes: list[tuple[int, bytes]] = []
    for pfn in sorted(outcome.pages):
        old, new = before.get(pfn, ZERO_PAGE), outcome.pages[pfn]
        changes += [((pfn << PAGE_SHIFT) + start, new[start:end]) for start, end in _differing_runs(old, new)]
    return changes


def _differing_runs(old: bytes, new: bytes) -> Iterator[tuple[int, int]]:
    """Where two pages differ: the (start, end) of each run of differing bytes."""
    start = None
    for chunk in range(0, PAGE_SIZE, _CHUNK):
        if start is None and old[chunk : chunk + _CHUNK] == new[chunk : chunk + _CHUNK]:
            continue  # most of a page is alike; whole chunks compare fast
        for i in range(chunk, chunk + _CHUNK):
            if old[i] == new[i]:
                if start is not None:
                    yield start, i
                    start = None
            elif start is None:
                start = i
    if start is not None:
        yield start, PAGE_SIZE
