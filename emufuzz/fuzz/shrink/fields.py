"""A case as fields with names, so that some of them can have their defaults again.

A part is the smallest thing with a value: a register, a member of a segment register, an entry of
memory, a device. Parts are what passes change. A field is what a reader counts: `seg.ds` and `gdtr`
are one each, and so is every other part. Their names are those of docs/case-format.md.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from typing import Any, Final, TypeAlias

import msgspec

from emufuzz.arch.regs import GPR_NAMES, SREG_NAMES
from emufuzz.case.fields import CONTROL_REGISTERS, DR_NAMES, FPU_CONTROL
from emufuzz.case.model import Case, Fpu, Memory, Segment, System, TableRegister, case_memory, is_physical
from emufuzz.fuzz.shrink.defaults import default_case

#: Names and indices on the way to a part.
Key: TypeAlias = tuple[Any, ...]
Parts: TypeAlias = dict[Key, Any]

_SEGMENT: Final = Segment.__struct_fields__
_PLAIN: Final = ("count", "port_in", "vendor", "emul_type", "single")
_TABLES: Final = ("gdtr", "idtr")
#: Registers whose members count as one field.
_REGISTERS: Final = frozenset(("seg", *_TABLES))
#: Members of `kvm` of which each entry is a part, and lists of which each element is one.
_KVM_MAPS: Final = ("knobs", "lapic")
_KVM_LISTS: Final = ("memslots", "ioeventfds")
_ABSENT: Final = object()


def parts_of(case: Case) -> Parts:
    """Every part of a case but its id, code, mode and path."""
    parts: Parts = {("gpr", name): value for name, value in zip(GPR_NAMES, case.gpr, strict=True)}
    parts["rip",], parts["rflags",] = case.rip, case.rflags
    parts.update(_system_parts(case.system))
    parts.update(((name,), getattr(case, name)) for name in _PLAIN)
    kind = "phys" if is_physical(case) else "mem"
    parts.update(((kind, addr), data) for addr, data in sorted_entries(case_memory(case)))
    extra = case.extra or {}
    for name in ("devices", "callbacks"):
        parts.update(((name, i), item) for i, item in enumerate(extra.get(name, ())))
    parts.update(_kvm_parts(extra.get("kvm") or {}))
    return parts


def _system_parts(system: System) -> Iterator[tuple[Key, Any]]:
    for name, segment in zip(SREG_NAMES, system.seg, strict=True):
        for member in _SEGMENT:
            yield ("seg", name, member), getattr(segment, member)
    for name in _TABLES:
        table = getattr(system, name)
        yield (name, "base"), table.base
        yield (name, "limit"), table.limit
    for name in CONTROL_REGISTERS:
        yield (name,), getattr(system, name)
    for name, value in zip(DR_NAMES, system.dr, strict=True):
        yield ("dr", name), value
    for index, value in system.msr:
        yield ("msr", index), value
    for name in FPU_CONTROL:
        yield ("fpu", name), getattr(system.fpu, name)
    for name in ("xmm", "mm"):
        for i, value in enumerate(getattr(system.fpu, name)):
            yield ("fpu", name, i), value


def _kvm_parts(kvm: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    for name, value in kvm.items():
        if name in _KVM_MAPS:
            yield from ((("kvm", name, key), item) for key, item in value.items())
        elif name in _KVM_LISTS:
            yield from ((("kvm", name, i), item) for i, item in enumerate(value))
        elif name == "cpuid":
            yield from _cpuid_parts(value)
        else:
            yield ("kvm", name), value


def _cpuid_parts(cpuid: Mapping[str, Any]) -> Iterator[tuple[Key, Any]]:
    for i, leaf in enumerate(cpuid.get("leaves", ())):
        yield ("kvm", "cpuid", "leaves", i), leaf
    for name, value in cpuid.get("features", {}).items():
        yield ("kvm", "cpuid", "features", name), value
    if "maxphyaddr" in cpuid:
        yield ("kvm", "cpuid", "maxphyaddr"), cpuid["maxphyaddr"]


def sorted_entries(memory: Memory) -> list[tuple[int, bytes]]:
    """The entries in ascending order and without overlaps; where some overlap, one per page."""
    entries = sorted(memory.entries, key=lambda entry: entry[0])
    ends = [addr + max(len(data), 1) for addr, data in entries]
    if all(end <= addr for end, (addr, _) in zip(ends, entries[1:], strict=False)):
        return entries
    return [(pfn << 12, page) for pfn, page in sorted(memory.pages.items())]


def case_of(case: Case, parts: Parts) -> Case:
    """The case with these parts; those of registers must be complete, others may be missing."""
    return Case(
        case.id,
        case.mode,
        case.code,
        tuple([parts["gpr", name] for name in GPR_NAMES]),
        parts["rip",],
        parts["rflags",],
        _system(parts),
        Memory(tuple(sorted((key[1], data) for key, data in parts.items() if key[0] == "mem"))),
        path=case.path,
        extra=_extra(case, parts),
        **{name: parts[name,] for name in _PLAIN},
    )


def _system(parts: Parts) -> System:
    registers: dict[str, Any] = {name: parts[name,] for name in CONTROL_REGISTERS}
    for name in _TABLES:
        registers[name] = TableRegister(parts[name, "base"], parts[name, "limit"])
    return System(
        seg=tuple([_segment(parts, name) for name in SREG_NAMES]),
        dr=tuple([parts["dr", name] for name in DR_NAMES]),
        msr=tuple(sorted((key[1], value) for key, value in parts.items() if key[0] == "msr")),
        fpu=_fpu(parts),
        **registers,
    )


def _segment(parts: Parts, name: str) -> Segment:
    return Segment(*[parts["seg", name, member] for member in _SEGMENT])


def _fpu(parts: Parts) -> Fpu:
    return Fpu(
        xmm=tuple([parts["fpu", "xmm", i] for i in range(16)]),
        mm=tuple([parts["fpu", "mm", i] for i in range(8)]),
        **{name: parts["fpu", name] for name in FPU_CONTROL},
    )


def _extra(case: Case, parts: Parts) -> dict[str, Any] | None:
    """`Case.extra` of the parts; a case with `phys` keeps it, even if it is empty."""
    extra: dict[str, Any] = {}
    if is_physical(case):
        entries = sorted((key[1], data) for key, data in parts.items() if key[0] == "phys")
        extra["phys"] = [{"addr": hex(addr), "data": data.hex()} if data else {"addr": hex(addr)}
                         for addr, data in entries]  # fmt: skip
    for name in ("devices", "callbacks"):
        items = [value for key, value in parts.items() if key[0] == name]
        if items:
            extra[name] = items
    kvm = _kvm(parts)
    if kvm:
        extra["kvm"] = kvm
    return extra or None


def _kvm(parts: Parts) -> dict[str, Any]:
    kvm: dict[str, Any] = {}
    for key, value in parts.items():
        if key[0] != "kvm":
            continue
        place = kvm
        for name in key[1:-1]:
            place = place.setdefault(name, {})
        place[key[-1]] = value
    for place, name in ((kvm, "memslots"), (kvm, "ioeventfds"), (kvm.get("cpuid", {}), "leaves")):
        if name in place:
            place[name] = list(place[name].values())
    return kvm


def field_of(key: Key) -> Key:
    """The field that a part belongs to."""
    return key[:-1] if key[0] in _REGISTERS else key


def field_name(key: Key) -> str:
    """A field's name: as in docs/case-format.md, members after a dot, entries of memory by their address."""
    if key[0] in ("mem", "phys"):
        return f"{key[0]}[{key[1]:#x}]"
    if key[0] == "fpu" and len(key) == 3:
        return f"fpu.{key[1]}[{key[2]}]"
    if key[0] == "dr":
        return str(key[1])
    hexadecimal = key[0] == "msr" or key[:2] == ("kvm", "lapic")
    text = str(key[0])
    for name in key[1:]:
        if isinstance(name, str):
            text += f".{name}"
        else:
            text += f".{name:#x}" if hexadecimal else f"[{name}]"
    return text


def differing_parts(case: Case) -> list[Key]:
    """The parts that do not have their default, in the order of the format; absent ones count, too."""
    default, parts = parts_of(default_case(case)), parts_of(case)
    return [key for key, value in parts.items() if default.get(key, _ABSENT) != value]


def differing_fields(case: Case) -> list[Key]:
    """The fields of which a part does not have its default."""
    return list(dict.fromkeys(field_of(key) for key in differing_parts(case)))


def non_default_fields(case: Case) -> tuple[str, ...]:
    """Names of the fields that do not have their default in the case's mode, privilege level and path.

    What a case is a finding of by itself does not count: its code, mode and path, nor its id.
    """
    return tuple(field_name(key) for key in differing_fields(case))


def with_defaults(case: Case, keys: Container[Key]) -> Case:
    """The case with these fields, or parts, as they are by default."""
    default = parts_of(default_case(case))
    parts = {
        key: default[key] if chosen and key in default else value
        for key, value in parts_of(case).items()
        if not (chosen := key in keys or field_of(key) in keys) or key in default
    }
    return case_of(case, parts)


def with_parts(case: Case, changes: Mapping[Key, Any]) -> Case:
    """The case with other values of some parts."""
    return case_of(case, parts_of(case) | dict(changes))


def with_code(case: Case, code: bytes) -> Case:
    """The case with other code."""
    return msgspec.structs.replace(case, code=code)
