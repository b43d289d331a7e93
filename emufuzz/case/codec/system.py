"""`System` as the difference from a template's; flags, control registers and access rights as XOR."""

from __future__ import annotations

from typing import Any, Final

import msgspec

from emufuzz.case.codec.stream import Source, mask, number
from emufuzz.case.fields import CONTROL_REGISTERS, FPU_CONTROL
from emufuzz.case.model import DEFAULT_FPU, Fpu, Segment, System, TableRegister
from emufuzz.case.system import intern_segment, intern_system

#: Bits of the access rights that a segment has: type 4, s 1, dpl 2, p avl l db g 1 each.
_RIGHTS: Final = (("type", 0, 15), ("s", 4, 1), ("dpl", 5, 3), ("p", 7, 1), ("avl", 8, 1), ("l", 9, 1),
                  ("db", 10, 1), ("g", 11, 1))  # fmt: skip
_RIGHTS_BITS: Final = 12
#: What may differ beside the segments, in the order of its bits.
_OTHERS: Final = (*CONTROL_REGISTERS, "gdtr", "idtr", "dr", "msr", "fpu")
_CONTROL_WIDTHS: Final = ((16, "fcw"), (16, "fsw"), (8, "ftw"), (32, "mxcsr"))


def write_system(out: bytearray, system: System, template: System) -> None:
    """Append in what `system` differs from `template`."""
    changed = [new != old for new, old in zip(system.seg, template.seg, strict=True)]
    others = [getattr(system, name) != getattr(template, name) for name in _OTHERS]
    out += mask(changed) + mask(others)
    for new, old in zip(system.seg, template.seg, strict=True):
        if new != old:
            _write_segment(out, new, old)
    for name, differs in zip(_OTHERS, others, strict=True):
        if differs:
            _WRITERS.get(name, _write_control)(out, getattr(system, name), getattr(template, name))


def read_system(source: Source, template: System) -> System:
    """The system that differs from `template` in what the source says."""
    segments, others = source.fixed(1), source.fixed(2)
    if not segments and not others & (1 << len(_OTHERS)) - 1:
        return template
    seg = [
        intern_segment(_read_segment(source, old)) if segments >> i & 1 else old
        for i, old in enumerate(template.seg)
    ]
    fields: dict[str, Any] = {"seg": tuple(seg)}
    for i, name in enumerate(_OTHERS):
        if others >> i & 1:
            fields[name] = _READERS.get(name, _read_control)(source, getattr(template, name))
    return intern_system(msgspec.structs.replace(template, **fields))


def _rights(segment: Segment) -> int:
    return sum(getattr(segment, name) << at for name, at, _ in _RIGHTS)


def _write_segment(out: bytearray, new: Segment, old: Segment) -> None:
    rights = _rights(new) ^ _rights(old)
    out += mask([new.sel != old.sel, new.base != old.base, new.limit != old.limit, bool(rights)])
    if new.sel != old.sel:
        out += number(new.sel, 16)
    if new.base != old.base:
        out += number(new.base)
    if new.limit != old.limit:
        out += number(new.limit, 32)
    if rights:
        out += number(rights, _RIGHTS_BITS)


def _read_segment(source: Source, old: Segment) -> Segment:
    given = source.byte()
    sel = source.number(16) if given & 1 else old.sel
    base = source.number() if given & 2 else old.base
    limit = source.number(32) if given & 4 else old.limit
    rights = _rights(old) ^ (source.number(_RIGHTS_BITS) if given & 8 else 0)
    return Segment(sel, base, limit, **{name: rights >> at & ones for name, at, ones in _RIGHTS})


def _write_control(out: bytearray, new: int, old: int) -> None:
    out += number(new ^ old)


def _read_control(source: Source, old: int) -> int:
    return source.number() ^ old


def _write_table(out: bytearray, new: TableRegister, _: TableRegister) -> None:
    out += number(new.base) + number(new.limit, 16)


def _read_table(source: Source, _: TableRegister) -> TableRegister:
    return TableRegister(source.number(), source.number(16))


def _write_debug(out: bytearray, new: tuple[int, ...], old: tuple[int, ...]) -> None:
    out += mask([one != other for one, other in zip(new, old, strict=True)])
    for one, other in zip(new, old, strict=True):
        if one != other:
            out += number(one ^ other)


def _read_debug(source: Source, old: tuple[int, ...]) -> tuple[int, ...]:
    given = source.byte()
    return tuple([value ^ source.number() if given >> i & 1 else value for i, value in enumerate(old)])


def _write_msrs(out: bytearray, new: tuple[tuple[int, int], ...], _: Any) -> None:
    out += number(len(new))
    for index, value in new:
        out += number(index, 32) + number(value)


def _read_msrs(source: Source, _: Any) -> tuple[tuple[int, int], ...]:
    """Sorted, each once; they end with the data."""
    found: dict[int, int] = {}
    for _one in range(source.number()):
        if source.ended:
            break
        index = source.number(32)
        found[index] = source.number()
    return tuple(sorted(found.items()))


def _write_fpu(out: bytearray, new: Fpu, _: Fpu) -> None:
    """Control and status against those after FNINIT, then the registers that are not 0."""
    out += mask([getattr(new, name) != getattr(DEFAULT_FPU, name) for name in FPU_CONTROL])
    out += mask([bool(value) for value in new.xmm]) + mask([bool(value) for value in new.mm])
    for width, name in _CONTROL_WIDTHS:
        value, usual = getattr(new, name), getattr(DEFAULT_FPU, name)
        if value != usual:
            out += number(value ^ usual, width)
    for value in filter(None, new.xmm):
        out += number(value & 0xFFFFFFFFFFFFFFFF) + number(value >> 64)
    for value in filter(None, new.mm):
        out += number(value)


def _read_fpu(source: Source, _: Fpu) -> Fpu:
    given, xmm, mm = source.byte(), source.fixed(2), source.byte()
    fields: dict[str, Any] = {
        name: source.number(width) ^ getattr(DEFAULT_FPU, name)
        for i, (width, name) in enumerate(_CONTROL_WIDTHS)
        if given >> i & 1
    }
    fields["xmm"] = tuple([source.number() | source.number() << 64 if xmm >> i & 1 else 0 for i in range(16)])
    fields["mm"] = tuple([source.number() if mm >> i & 1 else 0 for i in range(8)])
    return Fpu(**fields)


_WRITERS: Final[dict[str, Any]] = {
    "gdtr": _write_table, "idtr": _write_table, "dr": _write_debug, "msr": _write_msrs, "fpu": _write_fpu,
}  # fmt: skip
_READERS: Final[dict[str, Any]] = {
    "gdtr": _read_table, "idtr": _read_table, "dr": _read_debug, "msr": _read_msrs, "fpu": _read_fpu,
}  # fmt: skip
