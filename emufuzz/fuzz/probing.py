"""Whether rules vouch for a field: they do if they object to every wrong value of it that is tried.

Rules demand; they have no values of their own. So the subject's outcome is spoilt in one field at a time:
with what was there before, with what any oracle has there, and with single bits turned over. A rule that is
about half of a register, or about the field of other instructions, does not object to all of these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

import msgspec

from emufuzz.arch.exceptions import GP_VECTOR, PF_VECTOR, UD_VECTOR
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.devices import DeviceAccess, trace_to_obj
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import PAGE_MASK, PAGE_SHIFT, ZERO_PAGE, Case, Outcome, Segment, case_pages
from emufuzz.fuzz.changed import Field, access_field, open_flags
from emufuzz.oracle.device_trace import DEVICE_TRACE, trace_of
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.rules import RulesOracle

_SEGMENT_PARTS: Final = ("sel", "base", "limit", "type", "dpl", "db")
_BITS: Final = (0, 7, 15, 31, 63)
_TABLES: Final = ("gdtr", "idtr")
_CONTROL: Final = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "xcr0")


class Probe:
    """One case and the subject's outcome, for rules to be asked about its fields."""

    def __init__(self, rules: RulesOracle, case: Case, subject: Outcome, answers: Sequence[Outcome]) -> None:
        self._rules = rules
        self._case = case
        self._view = judge_case(case)
        self._subject = subject
        self._answers = answers
        self._judged = _takes(rules, case)
        self._known = self._objections(subject) if self._judged else set()

    def vouches(self, field: Field) -> bool:
        """Whether the rules object to every spoilt outcome, or to the field as it is."""
        if not self._judged:
            return False
        if any(name == field.name for _, name in self._known):
            return True
        spoilt = list(self._spoilt(field))
        return bool(spoilt) and all(self._objections(outcome) - self._known for outcome in spoilt)

    def _objections(self, outcome: Outcome) -> set[tuple[str, str]]:
        return {(violation.rule, violation.field) for violation in self._rules.review(self._case, outcome)}

    def _spoilt(self, field: Field) -> Iterator[Outcome]:
        name = field.name
        others = [_before(self._view, self._subject), *self._answers]
        if name == "rip":
            yield from self._numbers(others, lambda o: o.rip, lambda value: {"rip": value})
        elif name in GPR_NAMES:
            at = GPR_NAMES.index(name)
            yield from self._numbers(
                others, lambda o: o.gpr[at], lambda value: {"gpr": _put(self._subject.gpr, at, value)}
            )
        elif name == "rflags":
            yield from self._flags(others)
        elif name == "interruptibility":
            for value in {0, 1, 2} - {self._subject.interruptibility}:
                yield _with(self._subject, interruptibility=value)
        elif name.startswith("exception"):
            yield from self._exceptions(name, others)
        elif name == "mem":
            yield from self._memory(field.at, others)
        elif name == DEVICE_TRACE:
            yield from self._devices(field)
        elif not name.startswith("fpu."):
            yield from self._system(name, others)

    def _width(self) -> int:
        return 64 if self._view.mode == "prot64" else 32

    def _numbers(
        self,
        others: Iterable[Outcome],
        read: Callable[[Outcome], int],
        change: Callable[[int], dict[str, Any]],
    ) -> Iterator[Outcome]:
        """The value of the others, and ours with one bit turned over."""
        ours, width = read(self._subject), self._width()
        values = {read(other) for other in others} | {ours ^ 1 << bit for bit in _BITS if bit < width}
        for value in sorted(values - {ours}):
            yield _with(self._subject, **change(value))

    def _flags(self, others: Iterable[Outcome]) -> Iterator[Outcome]:
        """Each bit that is not as before, or as others have it."""
        ours, ignored = self._subject.rflags, open_flags(self._view, self._subject)
        changed = 0
        for other in others:
            changed |= (other.rflags ^ ours) & ~ignored
        while changed:
            bit = changed & -changed
            changed ^= bit
            yield _with(self._subject, rflags=ours ^ bit)

    def _exceptions(self, name: str, others: Iterable[Outcome]) -> Iterator[Outcome]:
        ours = self._subject.exception
        if ours is None or name == "exception":
            for fault in {other.exception for other in others} - {ours}:
                yield _with(self._subject, exception=fault, rc="propagate_fault" if fault else "continue")
            if ours is not None:
                for vector, code in ((UD_VECTOR, None), (GP_VECTOR, 0)):
                    if vector != ours[0]:
                        yield _with(self._subject, exception=(vector, code, None))
            return
        vector, code, address = ours
        if name == "exception.address" and address is not None:
            for wrong in (address ^ 1, address ^ 0x1000):
                yield _with(self._subject, exception=(vector, code, wrong))
        elif name == "exception.error_code" and code is not None:
            for bit in (0, 1, 2, 4) if vector == PF_VECTOR else (0, 2, 15):
                yield _with(self._subject, exception=(vector, code ^ 1 << bit, address))

    def _memory(self, at: int, others: Iterable[Outcome]) -> Iterator[Outcome]:
        """The first byte of a range as it was, as others have it, and with one bit turned over."""
        pfn, offset = at >> PAGE_SHIFT, at & PAGE_MASK
        old = case_pages(self._view).get(pfn, ZERO_PAGE)
        page = self._subject.pages.get(pfn, old)
        values = {old[offset], page[offset] ^ 1, page[offset] ^ 0x80}
        values |= {other.pages.get(pfn, old)[offset] for other in others}
        for value in sorted(values - {page[offset]}):
            changed = page[:offset] + bytes((value,)) + page[offset + 1 :]
            yield _with(self._subject, pages={**self._subject.pages, pfn: changed})

    def _devices(self, field: Field) -> Iterator[Outcome]:
        """Without the access, and with other data; with that of others if there was none."""
        trace = trace_of(self._subject) or []
        places = [i for i, access in enumerate(trace) if access_field(access) == field]
        if not places:
            theirs = [a for other in self._answers for a in trace_of(other) or () if access_field(a) == field]
            for access in theirs[:1]:
                yield self._with_trace([*trace, access])
        for place in places:
            access = trace[place]
            wrong = access._replace(data=bytes((access.data[0] ^ 1,)) + access.data[1:])
            for spoilt in (trace[:place] + trace[place + 1 :], [*trace[:place], wrong, *trace[place + 1 :]]):
                yield self._with_trace(spoilt)

    def _with_trace(self, trace: Sequence[DeviceAccess]) -> Outcome:
        extra = {**(self._subject.extra or {}), DEVICE_TRACE: trace_to_obj(trace)}
        return _with(self._subject, extra=extra)

    def _system(self, name: str, others: Iterable[Outcome]) -> Iterator[Outcome]:
        system = self._subject.system
        values: set[Any] = {_member(other.system, name) for other in others}
        ours = _member(system, name)
        if name in _CONTROL or name.startswith("dr"):
            values |= {ours ^ 1 << bit for bit in (0, 3)}
        elif isinstance(ours, Segment):
            values |= {
                msgspec.structs.replace(ours, **{part: getattr(ours, part) ^ 1}) for part in _SEGMENT_PARTS
            }
        elif name in _TABLES:
            values |= {
                msgspec.structs.replace(ours, base=ours.base ^ 1),
                msgspec.structs.replace(ours, limit=ours.limit ^ 1),
            }
        for value in sorted(values - {ours}, key=repr):
            yield _with(self._subject, system=_replaced(system, name, value))


def _takes(rules: RulesOracle, case: Case) -> bool:
    try:
        rules.check(case)
    except UnsupportedCaseError:
        return False
    return True


def _before(view: Case, subject: Outcome) -> Outcome:
    """Nothing has happened."""
    return Outcome(subject.id, view.gpr, view.rip, view.rflags, view.system)


def _with(outcome: Outcome, **changes: Any) -> Outcome:
    return msgspec.structs.replace(outcome, **changes)


def _put(values: tuple[Any, ...], at: int, value: Any) -> tuple[Any, ...]:
    return (*values[:at], value, *values[at + 1 :])


def _member(system: Any, name: str) -> Any:
    if name.startswith("seg."):
        return system.seg[SREG_NAMES.index(name[4:])]
    if name.startswith("dr"):
        return system.dr[int(name[2:])]
    return getattr(system, name)


def _replaced(system: Any, name: str, value: Any) -> Any:
    if name.startswith("seg."):
        return msgspec.structs.replace(system, seg=_put(system.seg, SREG_NAMES.index(name[4:]), value))
    if name.startswith("dr"):
        return msgspec.structs.replace(system, dr=_put(system.dr, int(name[2:]), value))
    return msgspec.structs.replace(system, **{name: value})
