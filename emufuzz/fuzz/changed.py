"""The fields that an instruction changed, as the subject or any oracle has it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Final, NamedTuple

from emufuzz.arch.exceptions import PF_VECTOR
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.arch.rflags import X86_EFLAGS_RF
from emufuzz.case.devices import PIO, DeviceAccess
from emufuzz.case.model import Case, Fpu, Outcome, System, memory_changes
from emufuzz.oracle.compare import is_fault, undefined_destination, undefined_now
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of

_TUPLES: Final = {"seg": tuple(f"seg.{name}" for name in SREG_NAMES), "dr": tuple(f"dr{i}" for i in range(8))}
_SORT: Final = 3  # the bits of Field.at that are kind and direction
_PLAIN: Final = tuple(name for name in System.__struct_fields__ if name not in (*_TUPLES, "fpu"))


class Field(NamedTuple):
    """`name` as in compare.Difference.field; `at` tells ranges of memory and accesses of devices apart.

    Memory: the first address of a contiguous range. Devices: that address or port, times 4, with the kind
    and direction of the accesses below it.
    """

    name: str
    at: int = -1


def changed_fields(case: Case, subject: Outcome, answers: Iterable[Outcome] = ()) -> list[Field]:
    """What is not as it was before, in any of the outcomes; what the SDM leaves undefined does not count.

    Each general register, segment register, system, debug and FPU register is a field, RIP and RFLAGS are,
    and so are vector, error code and address of an exception, each contiguous range of memory that was
    written with other bytes, and each such range of a device's addresses that was read or written.

    Args:
        case: As hardware executes it natively (emufuzz.oracle.native_view.judge_case).
        subject: What the subject made of it.
        answers: What oracles made of it.
    """
    outcomes = (subject, *answers)
    ignored_flags = open_flags(case, subject)
    found: dict[Field, None] = {}
    for outcome in outcomes:
        found.update(dict.fromkeys(_registers(case, outcome, ignored_flags)))
        found.update(dict.fromkeys(_exception(outcome)))
        if outcome.system is not case.system:
            found.update(dict.fromkeys(_system(case.system, outcome)))
    found.update(dict.fromkeys(_accesses(outcomes)))
    found.update(dict.fromkeys(_memory(case, outcomes)))
    ignored = _undefined(case, outcomes)
    return [field for field in found if field.name not in ignored]


def open_flags(case: Case, subject: Outcome) -> int:
    """RFLAGS bits that do not count: undefined ones, and RF of a fault, which its delivery sets."""
    return X86_EFLAGS_RF if is_fault(subject) else undefined_now(case, subject)


def _undefined(case: Case, outcomes: tuple[Outcome, ...]) -> frozenset[str]:
    subject, *answers = outcomes
    if is_fault(subject) or case.count != 1:
        return frozenset()
    found = {undefined_destination(case, subject, answer) for answer in answers} if subject.leaf else set()
    names = frozenset(name for name in found if name)
    return names | {DEVICE_TRACE} if "mem" in names else names


def _registers(case: Case, outcome: Outcome, ignored: int) -> Iterator[Field]:
    if outcome.rip != case.rip:
        yield Field("rip")
    if (outcome.rflags ^ case.rflags) & ~ignored:
        yield Field("rflags")
    if outcome.interruptibility:
        yield Field("interruptibility")
    if outcome.gpr != case.gpr:
        for name, old, new in zip(GPR_NAMES, case.gpr, outcome.gpr, strict=True):
            if old != new:
                yield Field(name)


def _exception(outcome: Outcome) -> Iterator[Field]:
    if outcome.exception is None:
        return
    _, code, address = outcome.exception
    yield Field("exception")
    if code is not None:
        yield Field("exception.error_code")
    if address is not None:
        yield Field("exception.address")


def _system(before: System, outcome: Outcome) -> Iterator[Field]:
    after = outcome.system
    for name in _PLAIN:
        if getattr(before, name) != getattr(after, name) and not (name == "cr2" and _is_address(outcome)):
            yield Field(name)
    for group, names in _TUPLES.items():
        yield from _differing(names, getattr(before, group), getattr(after, group))
    if before.fpu != after.fpu:
        for name in Fpu.__struct_fields__:
            old, new = getattr(before.fpu, name), getattr(after.fpu, name)
            if isinstance(old, int):
                yield from _differing((f"fpu.{name}",), (old,), (new,))
            else:
                yield from _differing(tuple(f"fpu.{name}{i}" for i in range(len(old))), old, new)


def _is_address(outcome: Outcome) -> bool:
    """CR2 is the address of the exception, which counts already."""
    fault = outcome.exception
    return fault is not None and fault[0] == PF_VECTOR and fault[2] == outcome.system.cr2


def _differing(names: Iterable[str], old: Iterable[Any], new: Iterable[Any]) -> Iterator[Field]:
    for name, a, b in zip(names, old, new, strict=True):
        if a != b:
            yield Field(name)


def _memory(case: Case, outcomes: Iterable[Outcome]) -> Iterator[Field]:
    runs = sorted(
        (at, at + len(data))
        for outcome in outcomes
        if outcome.pages
        for at, data in memory_changes(case, outcome)
    )
    end = -1
    for start, stop in runs:
        if start > end:
            yield Field("mem", start)
        end = max(end, stop)


def _accesses(outcomes: Iterable[Outcome]) -> Iterator[Field]:
    """Ranges of addresses, or ports, that were read or written without a hole."""
    found: set[tuple[int, int, int]] = set()
    for outcome in outcomes:
        for access in (trace_of(outcome) if outcome.extra else None) or ():
            found.add((access_field(access).at & _SORT, access.addr, access.addr + access.size))
    last, end = -1, -1
    for sort, start, stop in sorted(found):
        if sort != last or start > end:
            yield Field(DEVICE_TRACE, start << 2 | sort)
            end = -1
        last, end = sort, max(end, stop)


def access_field(access: DeviceAccess) -> Field:
    """The field of a range that begins with an access."""
    return Field(DEVICE_TRACE, access.addr << 2 | (access.kind == PIO) << 1 | access.write)
