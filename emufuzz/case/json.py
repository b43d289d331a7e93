"""Lossless JSON of Case and Outcome, as docs/case-format.md describes it.

Readers are strict: an unknown field, a wrong type or a value out of range raises CaseError with a
one-line message that names the field. `*_obj` functions work on decoded JSON, the others on text.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch.modes import mode_of
from emufuzz.arch.regs import GPR_NAMES, VCPU_SREG_CS
from emufuzz.case.document import decode_object
from emufuzz.case.events import events_to_json
from emufuzz.case.fields import CASE, OUTCOME
from emufuzz.case.machine import extra_of, extra_to_obj, outcome_extra_of
from emufuzz.case.memory import changed_pages, mem_to_json, memory_of
from emufuzz.case.model import Case, Fault, Outcome, System, memory_changes
from emufuzz.case.read import reader
from emufuzz.case.spec import FieldError
from emufuzz.case.system import changed_system, intern_system, system_of, system_to_json, system_to_obj

_read_case: Final = reader(CASE)
_read_outcome: Final = reader(OUTCOME)
_to_text: Final = msgspec.json.Encoder().encode

_GPR_TEMPLATE: Final = '"gpr":{' + ",".join(f'"{name}":"0x%x"' for name in GPR_NAMES) + "}"


def case_from_json(data: bytes | str) -> Case:
    """The Case that one JSON document describes.

    Raises:
        CaseError: the document is not a valid case.
    """
    return case_from_obj(decode_object(data))


def case_from_obj(obj: Any) -> Case:
    """The Case of a decoded JSON object.

    Raises:
        CaseError: it is not a valid case.
    """
    fields = _read_case(obj)
    get = fields.get
    system = intern_system(system_of(fields))
    rip, rflags = get("rip", 0), get("rflags", 0)
    if "mem" in fields and "phys" in fields:
        raise FieldError("cannot be given together with mem", "phys")
    return Case(
        id=get("id", ""),
        mode=_checked_mode(get("mode"), system, rflags),
        code=fields["code"],
        gpr=gpr_of(get("gpr"), (0,) * 16),
        rip=rip,
        rflags=rflags,
        system=system,
        mem=memory_of(get("mem")),
        count=get("count", 1),
        port_in=get("port_in", b""),
        vendor=get("vendor", "intel"),
        emul_type=get("emul_type", 0),
        single=get("single", 0),
        path=get("path"),
        extra=extra_of(obj, fields),
    )


def _checked_mode(label: str | None, system: System, rflags: int) -> str:
    cs = system.seg[VCPU_SREG_CS]
    mode = mode_of(system.cr0, system.efer, rflags, cs.l, cs.db)
    if label is not None and label != mode:
        raise FieldError(f"{label} contradicts the state, which is {mode}", "mode")
    return mode


def gpr_of(given: dict[str, int] | None, default: tuple[int, ...]) -> tuple[int, ...]:
    """The 16 registers: those of `given`, by name, over the default ones."""
    if not given:
        return default
    get = given.get
    return tuple([get(name, old) for name, old in zip(GPR_NAMES, default, strict=True)])


def case_to_obj(case: Case) -> dict[str, Any]:
    """The case as JSON values; fields that have their default are left out."""
    obj: dict[str, Any] = {"id": case.id, "mode": case.mode, "code": case.code.hex()}
    gpr = {name: hex(value) for name, value in zip(GPR_NAMES, case.gpr, strict=True) if value}
    if gpr:
        obj["gpr"] = gpr
    obj["rip"] = hex(case.rip)
    obj["rflags"] = hex(case.rflags)
    obj.update(system_to_obj(case.system))
    if case.mem.entries:
        obj["mem"] = [
            {"addr": hex(addr), "data": data.hex()} if data else {"addr": hex(addr)}
            for addr, data in case.mem.entries
        ]
    if case.port_in:
        obj["port_in"] = case.port_in.hex()
    for name, default in (("count", 1), ("vendor", "intel"), ("emul_type", 0), ("path", None), ("single", 0)):
        value = getattr(case, name)
        if value != default:
            obj[name] = value
    return obj | extra_to_obj(case.extra)


def case_to_json(case: Case) -> bytes:
    """The case as one line of JSON, without the newline."""
    return _to_text(case_to_obj(case))


def outcome_from_json(data: bytes | str, case: Case) -> Outcome:
    """The Outcome that one JSON document describes; state it leaves out is as in `case`.

    Raises:
        CaseError: the document is not a valid outcome.
    """
    return outcome_from_obj(decode_object(data), case)


def outcome_from_obj(obj: Any, case: Case) -> Outcome:
    """The Outcome of a decoded JSON object; state it leaves out is as in `case`.

    Raises:
        CaseError: it is not a valid outcome.
    """
    fields = _read_outcome(obj)
    outcome = outcome_of(fields, case)
    outcome.id = fields.get("id", case.id)
    outcome.unchecked = tuple([(item["field"], item["gap"]) for item in fields.get("unchecked", ())])
    outcome.crash = fields.get("crash", "")
    outcome.hang = fields.get("hang", False)
    outcome.extra = outcome_extra_of(obj, fields)
    return outcome


def outcome_of(fields: dict[str, Any], case: Case) -> Outcome:
    """The Outcome of read fields of an outcome or a delta."""
    get = fields.get
    return Outcome(
        id=case.id,
        gpr=gpr_of(get("gpr"), case.gpr),
        rip=get("rip", case.rip),
        rflags=get("rflags", case.rflags),
        system=changed_system(case.system, fields),
        rc=get("rc", "continue"),
        decode_rc=get("decode_rc", "ok"),
        length=get("length"),
        exception=_fault_of(get("exception")),
        interruptibility=get("interruptibility", 0),
        restarts=get("restarts", 0),
        pages=changed_pages(case, get("mem")),
        events=get("events") or (),
    )


def _fault_of(fields: dict[str, Any] | None) -> Fault | None:
    if fields is None:
        return None
    return fields["vector"], fields.get("error_code"), fields.get("address")


def outcome_to_json(case: Case, outcome: Outcome, *, events: bool = True) -> bytes:
    """The outcome as one line of JSON, without the newline: every field, or only the crash or hang.

    With `events` false the callback events are left out.
    """
    if outcome.crash or outcome.hang:
        return _to_text(_failure(outcome))
    length = "null" if outcome.length is None else outcome.length
    head = (
        f'{{"id":{_quoted(outcome.id)},"decode_rc":"{outcome.decode_rc}","rc":"{outcome.rc}","length":{length},'
        f'"exception":{_fault_to_json(outcome.exception)},"interruptibility":{outcome.interruptibility},'
        f'"restarts":{outcome.restarts}'
    )
    parts = [
        head,
        _GPR_TEMPLATE % tuple(outcome.gpr),
        f'"rip":"{outcome.rip:#x}","rflags":"{outcome.rflags:#x}"',
        system_to_json(outcome.system),
        f'"mem":{mem_to_json(memory_changes(case, outcome))}',
    ]
    if events:
        parts.append(f'"events":{events_to_json(outcome.events)}')
    if outcome.unchecked or outcome.extra:
        parts.append(_to_text(_additions(outcome))[1:-1].decode())
    return (",".join(parts) + "}").encode()


def outcome_to_obj(case: Case, outcome: Outcome, *, events: bool = True) -> dict[str, Any]:
    """The outcome as JSON values, with the fields of `outcome_to_json`."""
    obj: dict[str, Any] = msgspec.json.decode(outcome_to_json(case, outcome, events=events))
    return obj


def _quoted(text: str) -> str:
    return _to_text(text).decode()


def _fault_to_json(fault: Fault | None) -> str:
    if fault is None:
        return "null"
    vector, error_code, address = fault
    code = "null" if error_code is None else error_code
    where = "null" if address is None else f'"{address:#x}"'
    return f'{{"vector":{vector},"error_code":{code},"address":{where}}}'


def _failure(outcome: Outcome) -> dict[str, Any]:
    obj: dict[str, Any] = {"id": outcome.id}
    if outcome.crash:
        obj["crash"] = outcome.crash
    if outcome.hang:
        obj["hang"] = True
    return obj


def _additions(outcome: Outcome) -> dict[str, Any]:
    obj = dict(outcome.extra or {})
    if outcome.unchecked:
        obj["unchecked"] = [{"field": field, "gap": gap} for field, gap in outcome.unchecked]
    return obj
