"""Descriptors: hidden parts of segment registers, entries of the GDT, LDT and IDT, and their limits.

SDM Vol. 3A 3.4.5 "Segment Descriptors", 6.11 "IDT Descriptors".
"""

from __future__ import annotations

from random import Random
from typing import Final

import msgspec

from emufuzz.arch.descriptors import DescStruct
from emufuzz.arch.regs import VCPU_SREG_CS, VCPU_SREG_LDTR, VCPU_SREG_SS, VCPU_SREG_TR
from emufuzz.case.model import UNUSABLE, Case, Segment, TableRegister
from emufuzz.fuzz.mutate.base import overlay, with_register, with_system

_DATA: Final = (0, 2, 3, 4, 5)  # ES SS DS FS GS
_LIMITS: Final = (0, 7, 0xFF, 0xFFE, 0xFFF, 0x1000, 0x7FFF, 0x83FF, 0x8FFF, 0x9007, 0xFFFE, 0xFFFF, 0xFFFFF)
_BASES: Final = (0, 1, 0x10, 0x7FF8, 0x8000, 0x8001, 0xFFF0, 0x10000, 0xFFFFF000)
_HIGH_BASES: Final = (0x7FFFFFFFF000, 0xFFFF800000000000, 0x100000000)
_WIDE_LIMIT: Final = 0xFFFFFFFF
#: Types of gates and system segments that mean something somewhere.
_SYSTEM_TYPES: Final = (1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 14, 15, 0)
_HANDLER: Final = 0x40000


def other_segment(case: Case, rng: Random) -> Case:
    """One hidden field of a data or stack segment: base, limit, type, size, or unusable."""
    nr = rng.choice(_DATA)
    seg = list(case.system.seg)
    seg[nr] = _changed(rng, seg[nr], case, nr)
    return with_system(case, seg=tuple(seg))


def _changed(rng: Random, old: Segment, case: Case, nr: int) -> Segment:
    kind = rng.randrange(7)
    if kind == 0 and (nr != VCPU_SREG_SS or case.mode == "prot64"):
        return UNUSABLE if nr != VCPU_SREG_SS else Segment(old.sel & 3, dpl=old.dpl)
    if kind == 1:
        return msgspec.structs.replace(old, limit=rng.choice(_LIMITS), g=0)
    if kind == 2:
        return msgspec.structs.replace(old, limit=_WIDE_LIMIT, g=1)
    if kind == 3:
        return msgspec.structs.replace(old, type=rng.choice((1, 3, 5, 7, 11, 15)))
    if kind == 4:
        return msgspec.structs.replace(old, db=old.db ^ 1)
    high = _HIGH_BASES if case.mode == "prot64" and nr > VCPU_SREG_LDTR - 4 else ()
    base = rng.choice((*_BASES, *high))
    if case.mode in ("real", "vm86"):
        base &= 0xFFFF0
        return msgspec.structs.replace(old, base=base, sel=base >> 4)
    return msgspec.structs.replace(old, base=base)


def other_code_segment(case: Case, rng: Random) -> Case:
    """CS: its limit near the instruction's end, execute-only, or another default size and so mode."""
    seg = list(case.system.seg)
    old = seg[VCPU_SREG_CS]
    kind = rng.randrange(4)
    if kind == 0:
        end = case.rip + len(case.code)
        limit = min(end - rng.randrange(1, len(case.code) + 1), 0xFFFFF) if case.code else old.limit
        seg[VCPU_SREG_CS] = msgspec.structs.replace(old, limit=limit, g=0)
    elif kind == 1:
        seg[VCPU_SREG_CS] = msgspec.structs.replace(old, type=old.type ^ 2)
    elif kind == 2:
        seg[VCPU_SREG_CS] = msgspec.structs.replace(old, limit=_WIDE_LIMIT, g=1)
    else:
        seg[VCPU_SREG_CS] = msgspec.structs.replace(old, db=old.db ^ 1)
    return with_system(case, seg=tuple(seg))


def other_task(case: Case, rng: Random) -> Case:
    """TR's limit and type, or an LDT."""
    seg = list(case.system.seg)
    if rng.getrandbits(1):
        limit = rng.choice((0x67, 0x66, 0x2B, 0xFF, 0x7FF))
        kind = rng.choice((11, 11, 3))
        seg[VCPU_SREG_TR] = msgspec.structs.replace(seg[VCPU_SREG_TR], limit=limit, type=kind, g=0)
    else:
        base = rng.choice((case.system.gdtr.base, 0x8000, 0x8FF8))
        seg[VCPU_SREG_LDTR] = Segment(0x60, base, rng.choice((7, 0x3F, 0x7F)), 2, p=1)
    return with_system(case, seg=tuple(seg))


def other_table(case: Case, rng: Random) -> Case:
    """The limit, or the base, of the GDT or IDT."""
    name = rng.choice(("gdtr", "idtr"))
    old: TableRegister = getattr(case.system, name)
    if rng.getrandbits(1):
        limit = rng.choice((0, 7, 0xF, 0x17, 0x57, 0x5F, 0xFF, 0x3FF, 0xFFF, 0xFFFF))
        return with_system(case, **{name: TableRegister(old.base, limit)})
    return with_system(
        case, **{name: TableRegister(rng.choice((0, 0x1000, 0x8000, 0x8FFC, 0xC000)), old.limit)}
    )


def random_descriptor(rng: Random, *, gate: bool) -> bytes:
    """A descriptor of code, data or a system segment with plausible fields; or a gate."""
    dpl, present = rng.choice((0, 0, 1, 2, 3, 3)), int(rng.random() < 0.85)
    if gate:
        selector, offset = rng.choice((0x10, 0x18, 0x28, 0x60, 0, 0x11)), _HANDLER + rng.getrandbits(12)
        kind = rng.choice((4, 5, 6, 7, 12, 14, 15, 14, 15))
        low = offset & 0xFFFF | selector << 16
        high = kind << 8 | dpl << 13 | present << 15 | offset & 0xFFFF0000
        return (low | high << 32).to_bytes(8, "little")
    system = rng.random() < 0.25
    kind = rng.choice(_SYSTEM_TYPES) if system else rng.randrange(16)
    limit = rng.choice((0xFFFFF, 0xFFFF, 0x67, 0x2B, 0, 7, 0x8FFF))
    base = rng.choice((0, 0, 0x8000, 0x1800, 0x40000, 0xFFFFF000))
    bits = rng.getrandbits(3)
    return DescStruct(
        base, limit, kind, int(not system), dpl, present, 0, bits & 1, bits >> 1 & 1, bits >> 2
    ).pack()


def other_descriptor(case: Case, rng: Random) -> Case | None:
    """An entry of the GDT or LDT, and one in two times a register that selects it."""
    system = case.system
    ldt = system.seg[VCPU_SREG_LDTR]
    local = bool(ldt.p) and rng.random() < 0.3
    base, limit = (ldt.base, ldt.limit) if local else (system.gdtr.base, system.gdtr.limit)
    place = rng.randrange(1, max(2, min(limit + 1 >> 3, 32))) * 8
    changed = overlay(case, base + place, random_descriptor(rng, gate=rng.random() < 0.15))
    if changed is None or rng.getrandbits(1):
        return changed
    selector = place | 4 * local | rng.choice((0, 0, 3, 1))
    return selecting(changed, rng, selector)


def selecting(case: Case, rng: Random, selector: int) -> Case:
    """The case with a selector where segment loads, far transfers and task switches take it from."""
    nr = rng.choice((0, 0, 1, 2, 3))
    case = with_register(case, nr, case.gpr[nr] & ~0xFFFF | selector)
    base = 0 if case.mode == "prot64" else case.system.seg[VCPU_SREG_SS].base
    size = rng.choice((2, 4, 8))
    placed = overlay(case, base + case.gpr[4] + size, selector.to_bytes(2, "little"))
    return placed or case


def other_gate(case: Case, rng: Random) -> Case | None:
    """An entry of the IDT, or of real mode's vector table."""
    base, vector = case.system.idtr.base, rng.choice((0, 1, 3, 4, 6, 8, 10, 11, 12, 13, 14, 0x20, 0x80))
    if case.mode == "real":
        return overlay(case, base + 4 * vector, rng.getrandbits(16).to_bytes(2, "little") + b"\0\x40")
    size = 16 if case.mode in ("compat16", "compat32", "prot64") else 8
    return overlay(case, base + size * vector, random_descriptor(rng, gate=True).ljust(size, b"\0"))
