"""How the tables of samples are written: one case per rule, an outcome that keeps it, one that breaks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.build import build_case, build_system
from emufuzz.case.model import Case, Fault, Outcome, System, case_pages

UD: Fault = (6, None, None)
NM: Fault = (7, None, None)
GP0: Fault = (13, 0, None)
SS0: Fault = (12, 0, None)


@dataclass(frozen=True)
class Sample:
    """A case that a rule is about, with an outcome that satisfies it and one that violates it."""

    rule: str
    case: Case
    good: Outcome
    bad: Outcome


def case_of(mode: str, code: str, *, cpl: int | None = None, vendor: str = "intel", **keywords: Any) -> Case:
    """A case of the default layout; fields of System are given beside registers and `data`."""
    known = set(System.__struct_fields__) | set(SREG_NAMES)
    changes = {name: keywords.pop(name) for name in tuple(keywords) if name in known}
    extra, path = keywords.pop("extra", None), keywords.pop("path", None)
    system = build_system(mode, cpl, **changes)
    case = build_case(mode, bytes.fromhex(code), system=system, **keywords)
    return msgspec.structs.replace(case, vendor=vendor, extra=extra, path=path)


def outcome_of(case: Case, **changes: Any) -> Outcome:
    """The case's state behind the instruction, or before it if there is an exception, with changes.

    `mem` maps addresses to bytes that were written; GPRs and segment registers go by name.
    """
    exception = changes.pop("exception", None)
    rip = case.rip if exception else case.rip + len(case.code)
    gpr = [changes.pop(name, old) for name, old in zip(GPR_NAMES, case.gpr, strict=True)]
    seg = tuple(changes.pop(name, old) for name, old in zip(SREG_NAMES, case.system.seg, strict=True))
    system = case.system if seg == case.system.seg else msgspec.structs.replace(case.system, seg=seg)
    fields = {name: changes.pop(name) for name in tuple(changes) if name in System.__struct_fields__}
    if fields:
        system = msgspec.structs.replace(system, **fields)
    pages = written(case, changes.pop("mem", {}))
    outcome = Outcome(
        case.id, tuple(gpr), changes.pop("rip", rip), changes.pop("rflags", case.rflags), system,
        rc="propagate_fault" if exception else "continue", exception=exception, pages=pages,
    )  # fmt: skip
    for name, value in changes.items():
        setattr(outcome, name, value)
    return outcome


def written(case: Case, mem: dict[int, bytes]) -> dict[int, bytes]:
    """The pages of a case with bytes laid over them."""
    before, pages = case_pages(case), {}
    for address, data in mem.items():
        number, at = address >> 12, address & 0xFFF
        page = pages.get(number) or before[number]
        pages[number] = page[:at] + data + page[at + len(data) :]
    return pages


def fault(rule: str, expected: Fault, mode: str, code: str, **keywords: Any) -> Sample:
    """A rule that demands an exception: right if it comes, wrong if the instruction completes."""
    case = case_of(mode, code, **keywords)
    return Sample(rule, case, outcome_of(case, exception=expected), outcome_of(case))


def effect(rule: str, case: Case, good: dict[str, Any], bad: dict[str, Any]) -> Sample:
    """A rule about what an outcome has: the changes of one that is right and of one that is wrong."""
    return Sample(rule, case, outcome_of(case, **good), outcome_of(case, **bad))


def descriptor(type: int, *, s: int = 1, dpl: int = 0, p: int = 1, **fields: int) -> bytes:  # noqa: A002 - the field's name
    """Eight bytes of a descriptor."""
    return DescStruct(type=type, s=s, dpl=dpl, p=p, **{"limit": 0xFFFFF, "g": 1, "d": 1, **fields}).pack()
