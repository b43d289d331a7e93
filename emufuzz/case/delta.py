"""The form in which vectors record an outcome: what differs from the case, and nothing else.

`outcome_to_delta(case, outcome) == normalise_expect(case, expect)` compares an outcome with a
recorded one, numerically and completely.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.events import events_to_json
from emufuzz.case.fields import CONTROL_REGISTERS, DELTA, DR_NAMES, FPU_CONTROL
from emufuzz.case.json import outcome_of
from emufuzz.case.model import Case, Event, Fpu, Outcome, Segment, System, TableRegister, memory_changes
from emufuzz.case.read import reader

_read_delta: Final = reader(DELTA)
_HEX_MEMBERS: Final = frozenset({"sel", "base", "limit"})


def expect_to_outcome(case: Case, expect: Any) -> Outcome:
    """The Outcome that a vector's `expect` stands for; what it leaves out is as in the case.

    Raises:
        CaseError: `expect` is not valid.
    """
    return outcome_of(_read_delta(expect), case)


def normalise_expect(case: Case, expect: Any) -> dict[str, Any]:
    """`expect` in the one form that `outcome_to_delta` writes.

    Raises:
        CaseError: `expect` is not valid.
    """
    return outcome_to_delta(case, expect_to_outcome(case, expect))


def outcome_to_delta(case: Case, outcome: Outcome) -> dict[str, Any]:
    """What the outcome changed, in the form of a vector's `expect`.

    `length` is left out when decoding failed, as it means nothing then. Bytes of memory that
    changed are listed as maximal runs within pages.
    """
    if outcome.crash or outcome.hang:
        return {"crash": outcome.crash} if outcome.crash else {"hang": True}
    delta = _result(outcome)
    gpr = _changed(GPR_NAMES, case.gpr, tuple(outcome.gpr))
    if gpr:
        delta["gpr"] = gpr
    for name in ("rip", "rflags"):
        value = getattr(outcome, name)
        if value != getattr(case, name):
            delta[name] = hex(value)
    if outcome.system is not case.system:
        delta |= _system_delta(case.system, outcome.system)
    changes = memory_changes(case, outcome)
    if changes:
        delta["mem"] = [{"addr": hex(addr), "data": data.hex()} for addr, data in changes]
    events = recorded_events(outcome)
    if events:
        delta["events"] = msgspec.json.decode(events_to_json(events))
    return delta


def _result(outcome: Outcome) -> dict[str, Any]:
    result: dict[str, Any] = {"rc": outcome.rc}
    if outcome.decode_rc != "ok":
        result["decode_rc"] = outcome.decode_rc
    elif outcome.length is not None:
        result["length"] = outcome.length
    if outcome.exception is not None:
        vector, error_code, address = outcome.exception
        where = None if address is None else hex(address)
        result["exception"] = {"vector": vector, "error_code": error_code, "address": where}
    for name in ("interruptibility", "restarts"):
        if value := getattr(outcome, name):
            result[name] = value
    return result


def recorded_events(outcome: Outcome) -> list[Event]:
    """The outcome's events without a leading fetch that is the only fetch of a run without exception.

    Almost every instruction makes that one fetch, so that vectors do not spell it out.
    """
    events = list(outcome.events)
    if not events or outcome.exception is not None or events[0][0] != "fetch":
        return events
    return events if any(event[0] == "fetch" for event in events[1:]) else events[1:]


def _system_delta(old: System, new: System) -> dict[str, Any]:
    delta: dict[str, Any] = {}
    seg = {
        name: members
        for name, a, b in zip(SREG_NAMES, old.seg, new.seg, strict=True)
        if a is not b and (members := _changed_members(a, b))
    }
    if seg:
        delta["seg"] = seg
    for name in ("gdtr", "idtr"):
        members = _changed_members(getattr(old, name), getattr(new, name))
        if members:
            delta[name] = members
    delta |= {
        name: hex(value) for name in CONTROL_REGISTERS if (value := getattr(new, name)) != getattr(old, name)
    }
    for name, changed in (
        ("dr", _changed(DR_NAMES, old.dr, new.dr)),
        ("msr", _changed_msrs(old, new)),
        ("fpu", _changed_fpu(old.fpu, new.fpu)),
    ):
        if changed:
            delta[name] = changed
    return delta


def _changed(names: tuple[str, ...], old: tuple[int, ...], new: tuple[int, ...]) -> dict[str, str]:
    if old == new:
        return {}
    return {name: hex(b) for name, a, b in zip(names, old, new, strict=True) if a != b}


def _changed_members(old: Segment | TableRegister, new: Segment | TableRegister) -> dict[str, Any]:
    before, after = msgspec.structs.asdict(old), msgspec.structs.asdict(new)
    return {
        name: hex(value) if name in _HEX_MEMBERS else value
        for name, value in after.items()
        if value != before[name]
    }


def _changed_msrs(old: System, new: System) -> dict[str, str]:
    before = dict(old.msr)
    return {hex(index): hex(value) for index, value in new.msr if before.get(index) != value}


def _changed_fpu(old: Fpu, new: Fpu) -> dict[str, Any]:
    delta: dict[str, Any] = {
        name: hex(getattr(new, name)) for name in FPU_CONTROL if getattr(new, name) != getattr(old, name)
    }
    for name in ("xmm", "mm"):
        before, after = getattr(old, name), getattr(new, name)
        changed = {str(i): hex(b) for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
        if changed:
            delta[name] = changed
    return delta
