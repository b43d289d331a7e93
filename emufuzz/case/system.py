"""`System` from and to the exchange format, shared between the cases that have equal ones."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.arch.regs import SREG_NAMES
from emufuzz.case.fields import CONTROL_REGISTERS, DR_NAMES, FPU_CONTROL
from emufuzz.case.intern import Intern
from emufuzz.case.model import (
    DEFAULT_FPU,
    UNUSABLE,
    Fpu,
    Segment,
    System,
    TableRegister,
)

#: An equal System that was seen before, or this one: equal systems become one object.
intern_system: Intern[System] = Intern()
intern_segment: Intern[Segment] = Intern()

_NO_TABLE: Final = TableRegister()
_HEX_MEMBERS: Final = frozenset({"sel", "base", "limit"})
_FRAGMENT: Final = "case.json"  # name under which a System keeps its JSON


def system_of(fields: dict[str, Any]) -> System:
    """The System that the read fields of a case describe; absent ones have their defaults."""
    get = fields.get
    seg, dr = get("seg", {}), get("dr", {})
    return System(
        seg=tuple([_segment(seg.get(name)) for name in SREG_NAMES]),
        gdtr=_table(get("gdtr")),
        idtr=_table(get("idtr")),
        dr=tuple([dr.get(name, 0) for name in DR_NAMES]),
        msr=tuple(sorted(get("msr", {}).items())),
        fpu=_fpu(get("fpu")),
        **{name: fields[name] for name in CONTROL_REGISTERS if name in fields},
    )


def _segment(fields: dict[str, int] | None) -> Segment:
    return intern_segment(Segment(**fields)) if fields else UNUSABLE


def _table(fields: dict[str, int] | None) -> TableRegister:
    return TableRegister(**fields) if fields else _NO_TABLE


def _fpu(fields: dict[str, Any] | None) -> Fpu:
    if not fields:
        return DEFAULT_FPU
    xmm, mm = fields.pop("xmm", []), fields.pop("mm", [])
    return Fpu(
        xmm=(*xmm, *(0,) * (16 - len(xmm))),
        mm=(*mm, *(0,) * (8 - len(mm))),
        **fields,
    )


def changed_system(system: System, fields: dict[str, Any]) -> System:
    """`system` with what a delta or an outcome lists changed; the same object if nothing differs.

    `fields` are read fields: within seg, dr, msr, gdtr, idtr and fpu absent members stay as they
    were; fpu.xmm and fpu.mm are maps from index to value, or lists.
    """
    new: dict[str, Any] = {name: fields[name] for name in CONTROL_REGISTERS if name in fields}
    if "seg" in fields:
        given = fields["seg"]
        new["seg"] = tuple(
            [
                msgspec.structs.replace(old, **given[name]) if name in given else old
                for name, old in zip(SREG_NAMES, system.seg, strict=True)
            ]
        )
    for name, table in (("gdtr", system.gdtr), ("idtr", system.idtr)):
        if name in fields:
            new[name] = msgspec.structs.replace(table, **fields[name])
    if "dr" in fields:
        new["dr"] = tuple(
            [fields["dr"].get(name, old) for name, old in zip(DR_NAMES, system.dr, strict=True)]
        )
    if "msr" in fields:
        new["msr"] = tuple(sorted({**dict(system.msr), **fields["msr"]}.items()))
    if "fpu" in fields:
        new["fpu"] = _changed_fpu(system.fpu, fields["fpu"])
    if not new:
        return system
    changed = msgspec.structs.replace(system, **new)
    return system if changed == system else intern_system(changed)


def _changed_fpu(fpu: Fpu, given: dict[str, Any]) -> Fpu:
    new = dict(given)
    for name, old in (("xmm", fpu.xmm), ("mm", fpu.mm)):
        if name in given:
            values = given[name]
            pairs = values if isinstance(values, dict) else dict(enumerate(values))
            new[name] = tuple([pairs.get(i, value) for i, value in enumerate(old)])
    return msgspec.structs.replace(fpu, **new)


def system_to_json(system: System) -> str:
    """Every field of a System as JSON members `"seg":{..},..,"fpu":{..}`, made once per object."""
    kept = system.__dict__
    text = kept.get(_FRAGMENT)
    if text is None:
        text = kept[_FRAGMENT] = _system_text(system)
    return str(text)


def _system_text(system: System) -> str:
    parts = [
        f'"seg":{{{",".join([_segment_text(*pair) for pair in zip(SREG_NAMES, system.seg, strict=True)])}}}',
        f'"gdtr":{{"base":"{system.gdtr.base:#x}","limit":"{system.gdtr.limit:#x}"}}',
        f'"idtr":{{"base":"{system.idtr.base:#x}","limit":"{system.idtr.limit:#x}"}}',
    ]
    parts += [f'"{name}":"{getattr(system, name):#x}"' for name in CONTROL_REGISTERS]
    dr = [f'"{name}":"{value:#x}"' for name, value in zip(DR_NAMES, system.dr, strict=True)]
    msr = [f'"{index:#x}":"{value:#x}"' for index, value in system.msr]
    parts += [f'"dr":{{{",".join(dr)}}}', f'"msr":{{{",".join(msr)}}}', _fpu_text(system.fpu)]
    return ",".join(parts)


def _segment_text(name: str, s: Segment) -> str:
    return (
        f'"{name}":{{"sel":"{s.sel:#x}","base":"{s.base:#x}","limit":"{s.limit:#x}","type":{s.type},"s":{s.s},'
        f'"dpl":{s.dpl},"p":{s.p},"avl":{s.avl},"l":{s.l},"db":{s.db},"g":{s.g}}}'
    )


def _fpu_text(fpu: Fpu) -> str:
    xmm = ",".join([f'"{value:#x}"' for value in fpu.xmm])
    mm = ",".join([f'"{value:#x}"' for value in fpu.mm])
    return (
        f'"fpu":{{"fcw":"{fpu.fcw:#x}","fsw":"{fpu.fsw:#x}","ftw":"{fpu.ftw:#x}","mxcsr":"{fpu.mxcsr:#x}",'
        f'"xmm":[{xmm}],"mm":[{mm}]}}'
    )


def system_to_obj(system: System) -> dict[str, Any]:
    """The System as JSON values; what has its default is left out."""
    obj: dict[str, Any] = {}
    seg = {
        name: _members(value) for name, value in zip(SREG_NAMES, system.seg, strict=True) if value != UNUSABLE
    }
    if seg:
        obj["seg"] = seg
    for name in ("gdtr", "idtr"):
        table = _members(getattr(system, name))
        if table:
            obj[name] = table
    obj |= {name: hex(value) for name in CONTROL_REGISTERS if (value := getattr(system, name))}
    dr = {name: hex(value) for name, value in zip(DR_NAMES, system.dr, strict=True) if value}
    if dr:
        obj["dr"] = dr
    if system.msr:
        obj["msr"] = {hex(index): hex(value) for index, value in system.msr}
    fpu = _fpu_to_obj(system.fpu)
    if fpu:
        obj["fpu"] = fpu
    return obj


def _members(value: Segment | TableRegister) -> dict[str, Any]:
    """Members that are not zero, in the form that their declaration asks for."""
    members = msgspec.structs.asdict(value)
    return {name: hex(v) if name in _HEX_MEMBERS else v for name, v in members.items() if v}


def _fpu_to_obj(fpu: Fpu) -> dict[str, Any]:
    obj: dict[str, Any] = {
        name: hex(value)
        for name in FPU_CONTROL
        if (value := getattr(fpu, name)) != getattr(DEFAULT_FPU, name)
    }
    for name in ("xmm", "mm"):
        values = getattr(fpu, name)
        if any(values):
            obj[name] = [hex(value) for value in values]
    return obj
