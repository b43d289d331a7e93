"""What the dimensions share: the scope of changes, small changes of a case, and what makes one valid."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec

from emufuzz.arch.modes import MODES, mode_of
from emufuzz.arch.regs import VCPU_SREG_CS
from emufuzz.case.check import check_system
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_obj, case_to_obj
from emufuzz.case.model import Case, Memory, System, case_memory, is_physical
from emufuzz.case.translate import translate
from emufuzz.fuzz.kvm.recipes import RECIPES
from emufuzz.fuzz.kvm.spice import TASK_PRIORITY, with_priority

MASK32: Final = 0xFFFFFFFF
MASK64: Final = 0xFFFFFFFFFFFFFFFF
#: The one path whose states no VM entry accepts.
INVALID_STATE: Final = "invalid-guest-state"
#: Entries of memory above which an overlay replaces pages instead of lying over them.
_MOST_ENTRIES: Final = 48


class Scope(NamedTuple):
    """What a mutant may be: of these modes, and on these exit paths if its parent is on one.

    `callbacks` tells whether the emulator's callbacks may be told to fail.
    """

    modes: tuple[str, ...] = MODES
    paths: tuple[str, ...] = ()
    callbacks: bool = False


#: A change of one dimension; None where the case has nothing to change.
Mutation: TypeAlias = Callable[[Case, Random], Case | None]
#: One that depends on what a mutant may be.
ScopedMutation: TypeAlias = Callable[[Case, Random, Scope], Case | None]


def code_bits(case: Case) -> int:
    """16, 32 or 64: how the case's code is decoded."""
    if case.mode == "prot64":
        return 64
    return 32 if case.system.seg[VCPU_SREG_CS].db else 16


def address_mask(case: Case) -> int:
    """Which bits of a linear address count."""
    return MASK64 if case.mode == "prot64" else MASK32


def with_register(case: Case, nr: int, value: int) -> Case:
    """The case with another value of one register, of as many bits as its mode has.

    Outside 64-bit mode nothing is defined of the upper halves (SDM Vol. 1 3.4.1.1).
    """
    gpr = list(case.gpr)
    gpr[nr] = value & address_mask(case)
    return msgspec.structs.replace(case, gpr=tuple(gpr))


def with_system(case: Case, **changes: Any) -> Case:
    """The case with other fields of its System, in the mode that they make."""
    system: System = msgspec.structs.replace(case.system, **changes)
    cs = system.seg[VCPU_SREG_CS]
    mode = mode_of(system.cr0, system.efer, case.rflags, cs.l, cs.db)
    return msgspec.structs.replace(case, system=system, mode=mode)


def with_extra(case: Case, name: str, value: Any) -> Case:
    """The case with another member of `extra`, or without it if the value is empty."""
    extra = {**(case.extra or {}), name: value}
    if not value:
        del extra[name]
    return msgspec.structs.replace(case, extra=extra or None)


def overlay(case: Case, linear: int, data: bytes) -> Case | None:
    """The case with `data` in its memory; None if there is no memory at that linear address.

    In physical memory the tables decide where that is; `data` does not go beyond the end of a page.
    """
    linear &= address_mask(case)
    data = data[: 0x1000 - (linear & 0xFFF)]
    if not is_physical(case):
        return _flat_overlay(case, linear, data)
    system, pages = case.system, case_memory(case).pages
    address = translate(pages, system.cr0, system.cr3, system.cr4, system.efer, linear)
    return None if address is None else physical_overlay(case, address, data)


def _flat_overlay(case: Case, linear: int, data: bytes) -> Case | None:
    pages = case.mem.pages
    if linear >> 12 not in pages:
        return None
    if len(case.mem.entries) < _MOST_ENTRIES:
        return msgspec.structs.replace(case, mem=Memory((*case.mem.entries, (linear, data))))
    page, at = bytearray(pages[linear >> 12]), linear & 0xFFF
    page[at : at + len(data)] = data
    merged = {**pages, linear >> 12: bytes(page)}
    entries = tuple((pfn << 12, content) for pfn, content in sorted(merged.items()))
    return msgspec.structs.replace(case, mem=Memory(entries))


def physical_overlay(case: Case, address: int, data: bytes) -> Case | None:
    """The case with `data` at a physical address of its `phys`; None if there is no memory."""
    pages = case_memory(case).pages
    if address >> 12 not in pages:
        return None
    entries = [*(case.extra or {})["phys"], {"addr": hex(address), "data": data.hex()}]
    if len(entries) > _MOST_ENTRIES + len(pages):
        page, at = bytearray(pages[address >> 12]), address & 0xFFF
        page[at : at + len(data)] = data
        merged = {**pages, address >> 12: bytes(page)}
        entries = [{"addr": hex(pfn << 12), "data": content.hex()} for pfn, content in sorted(merged.items())]
    return with_extra(case, "phys", entries)


def agreed(case: Case) -> Case:
    """The case with a state that does not contradict itself where `is_valid` does not look.

    CR8 is the task priority of the local APIC if the case has that (SDM Vol. 3A 10.8.6.1). Outside 64-bit
    mode RIP has 32 bits (SDM Vol. 3C 26.3.1.4), and of registers no more is defined (SDM Vol. 1 3.4.1.1).
    """
    lapic = ((case.extra or {}).get("kvm") or {}).get("lapic")
    if lapic and TASK_PRIORITY in lapic:
        system = with_priority(case.system, lapic)
        if system is not case.system:
            case = msgspec.structs.replace(case, system=system)
    if case.mode != "prot64" and (case.rip > MASK32 or max(case.gpr) > MASK32):
        gpr = tuple([value & MASK32 for value in case.gpr])
        case = msgspec.structs.replace(case, rip=case.rip & MASK32, gpr=gpr)
    return case


def is_valid(mutant: Case, parent: Case, scope: Scope) -> bool:
    """A mutant that the exchange format can hold, as possible a state as its parent, and in the scope."""
    if mutant.mode != parent.mode and not _may_have(mutant, scope):
        return False
    changed = mutant.system is not parent.system or mutant.rflags != parent.rflags
    if changed and not _is_possible(mutant, parent):
        return False
    if mutant.extra is parent.extra and mutant.path == parent.path:
        return True
    return _is_readable(mutant)


def _may_have(mutant: Case, scope: Scope) -> bool:
    if mutant.mode not in scope.modes:
        return False
    return mutant.path is None or mutant.mode in RECIPES[mutant.path].modes


def _is_possible(mutant: Case, parent: Case) -> bool:
    """Of a path for impossible states, and of an impossible parent, a mutant may be impossible, too."""
    if mutant.path == INVALID_STATE or not check_system(mutant.system, mutant.rflags):
        return True
    return bool(check_system(parent.system, parent.rflags))


def _is_readable(mutant: Case) -> bool:
    try:
        case_from_obj(case_to_obj(mutant))
    except CaseError:
        return False
    return True
