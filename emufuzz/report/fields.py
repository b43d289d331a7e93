"""An outcome as named fields with printable values, and which of them several outcomes disagree on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from emufuzz.arch.exceptions import exception_name
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.arch.rflags import X86_EFLAGS_IOPL, X86_EFLAGS_IOPL_BIT, flag_names
from emufuzz.case.model import (
    PAGE_SHIFT,
    PAGE_SIZE,
    ZERO_PAGE,
    Case,
    Event,
    Fault,
    Outcome,
    System,
    case_pages,
)

CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0")
FPU_WORDS: Final = ("fcw", "fsw", "ftw", "mxcsr")
RUN: Final = 8  # bytes of memory in one row

#: Engines that say nothing about a thing are shown with this.
ABSENT: Final = "-"


class Row(NamedTuple):
    """One field that outcomes disagree on: its value before, and after in each of them."""

    name: str
    before: str
    after: tuple[str, ...]


def show_flags(rflags: int) -> str:
    """RFLAGS as a number and the names of the set flags."""
    names = flag_names(rflags & ~X86_EFLAGS_IOPL)
    if rflags & X86_EFLAGS_IOPL:
        names.append(f"IOPL={rflags >> X86_EFLAGS_IOPL_BIT & 3}")
    return f"{rflags:#x} [{' '.join(names)}]"


def show_exception(fault: Fault | None) -> str:
    """An exception as `#PF(0x2) at 0xc000`, or `none`."""
    if fault is None:
        return "none"
    vector, code, address = fault
    text = exception_name(vector) + ("" if code is None else f"({code:#x})")
    return text if address is None else f"{text} at {address:#x}"


def show_event(event: Event) -> str:
    """A callback call as `write 0x9000 02 std`."""
    return " ".join(_show_item(item) for item in event)


def _show_item(item: Any) -> str:
    if isinstance(item, bytes | bytearray):
        return item.hex()
    if isinstance(item, int):
        return hex(item) if item > 9 else str(item)
    return str(item)


def outcome_fields(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Every field of an outcome except memory and events, in the order people read them."""
    if outcome.crash or outcome.hang:
        yield "failed", "hang" if outcome.hang else outcome.crash.strip().splitlines()[-1]
        return
    yield "decoded", outcome.decode_rc
    yield "result", outcome.rc
    yield "exception", show_exception(outcome.exception)
    if outcome.length is not None and outcome.decode_rc == "ok":
        yield "length", str(outcome.length)
    yield "rip", hex(outcome.rip)
    yield "rflags", show_flags(outcome.rflags)
    for name, value in zip(GPR_NAMES, outcome.gpr, strict=True):
        yield name, hex(value)
    yield "interruptibility", str(outcome.interruptibility)
    yield "restarts", str(outcome.restarts)
    yield from system_fields(outcome.system)


def system_fields(system: System) -> Iterator[tuple[str, str]]:
    """Segments, tables, control, debug and model-specific registers and the FPU, one value each."""
    for name, segment in zip(SREG_NAMES, system.seg, strict=True):
        for member in segment.__struct_fields__:
            yield f"{name}.{member}", hex(getattr(segment, member))
    for name, table in (("gdtr", system.gdtr), ("idtr", system.idtr)):
        yield f"{name}.base", hex(table.base)
        yield f"{name}.limit", hex(table.limit)
    for name in CONTROL:
        yield name, hex(getattr(system, name))
    for i, value in enumerate(system.dr):
        yield f"dr{i}", hex(value)
    for index, value in system.msr:
        yield f"msr {index:#x}", hex(value)
    for name in FPU_WORDS:
        yield name, hex(getattr(system.fpu, name))
    for i, value in enumerate(system.fpu.xmm):
        yield f"xmm{i}", hex(value)
    for i, value in enumerate(system.fpu.mm):
        yield f"mm{i}", hex(value)


def before_fields(case: Case) -> dict[str, str]:
    """The state before, under the names of `outcome_fields`."""
    fields = {"rip": hex(case.rip), "rflags": show_flags(case.rflags)}
    fields.update((name, hex(value)) for name, value in zip(GPR_NAMES, case.gpr, strict=True))
    fields.update(system_fields(case.system))
    return fields


def disagreements(case: Case, outcomes: Sequence[Outcome]) -> list[Row]:
    """The fields on which the outcomes are not all alike, memory and events last.

    Events are compared only between outcomes that have any, as most oracles record none.
    """
    before = before_fields(case)
    flat = [dict(outcome_fields(outcome)) for outcome in outcomes]
    names = dict.fromkeys(name for fields in flat for name in fields)
    rows = []
    for name in names:
        after = tuple(fields.get(name, ABSENT) for fields in flat)
        if len({value for value in after if value != ABSENT or name.startswith("msr")}) > 1:
            rows.append(Row(name, before.get(name, ""), after))
    return rows + _memory_rows(case, outcomes) + _event_rows(outcomes)


def _memory_rows(case: Case, outcomes: Sequence[Outcome]) -> list[Row]:
    pages = case_pages(case)
    rows = []
    for pfn in sorted({pfn for outcome in outcomes for pfn in outcome.pages}):
        old = pages.get(pfn, ZERO_PAGE)
        new = [outcome.pages.get(pfn, old) for outcome in outcomes]
        for start, end in _runs(new):
            at = (pfn << PAGE_SHIFT) + start
            rows.append(
                Row(f"[{at:#x}]", old[start:end].hex(" "), tuple(page[start:end].hex(" ") for page in new))
            )
    return rows


def _runs(pages: Sequence[bytes]) -> Iterator[tuple[int, int]]:
    """Ranges of at most RUN bytes within which the pages differ."""
    differing = [i for i in range(PAGE_SIZE) if len({page[i] for page in pages}) > 1]
    start = end = -1
    for i in differing:
        if start >= 0 and (i > end or i - start >= RUN):
            yield start, end
            start = i
        elif start < 0:
            start = i
        end = i + 1
    if start >= 0:
        yield start, end


def _event_rows(outcomes: Sequence[Outcome]) -> list[Row]:
    logs = [[show_event(event) for event in outcome.events] for outcome in outcomes]
    recorded = [log for log in logs if log]
    if len(recorded) < 2:
        return []
    rows = []
    for i in range(max(map(len, recorded))):
        after = tuple((log[i] if i < len(log) else "(none)") if log else ABSENT for log in logs)
        if len(set(after) - {ABSENT}) > 1:
            rows.append(Row(f"callback {i + 1}", "", after))
    return rows
