"""Passes over the machine state: defaults, a lower privilege level, simpler values."""

from __future__ import annotations

from typing import Final

from emufuzz.case.build import cpls_of
from emufuzz.case.fields import CONTROL_REGISTERS
from emufuzz.case.model import Case
from emufuzz.fuzz.shrink.bits import smaller
from emufuzz.fuzz.shrink.defaults import cpl_of, default_case
from emufuzz.fuzz.shrink.fields import (
    Key,
    case_of,
    differing_fields,
    differing_parts,
    parts_of,
    with_defaults,
    with_parts,
)
from emufuzz.fuzz.shrink.probe import Probe
from emufuzz.fuzz.shrink.reduce import reduced

#: Numbers of a case whose bits mean nothing to the case model; those of `kvm` have a pass of their own.
_NUMBERS: Final = frozenset(
    ("gpr", "rip", "rflags", "seg", "gdtr", "idtr", "dr", "msr", "fpu", "emul_type", *CONTROL_REGISTERS)
)
#: Fields that readers expect to matter.
_OPERANDS: Final = frozenset(("gpr", "rflags", "mem", "phys"))


def to_defaults(case: Case, probe: Probe) -> Case:
    """As many fields as possible to their defaults, then as many members of the others."""
    case = _defaulted(case, sorted(differing_fields(case), key=_last), probe)
    return _defaulted(case, sorted(differing_parts(case), key=_last), probe)


def _last(key: Key) -> bool:
    """Operands come last: where either they or something odd can go, they stay."""
    return key[0] in _OPERANDS


def _defaulted(case: Case, keys: list[Key], probe: Probe) -> Case:
    def only(kept: list[Key]) -> Case:
        return with_defaults(case, frozenset(keys).difference(kept))

    return only(reduced(keys, lambda kept: probe.keeps(only(kept))))


def to_lower_privilege(case: Case, probe: Probe) -> Case:
    """Privilege level 0 if the level does not matter, or 3 instead of 1 and 2."""
    level, levels = cpl_of(case), cpls_of(case.mode)
    for other in (0, 3):
        if level in {0, other} or other not in levels:
            continue
        if probe.keeps(moved := at_level(case, other)):
            return moved
    return case


def at_level(case: Case, cpl: int) -> Case:
    """The case at another privilege level: what was default at the old one is so at the new one."""
    old, new = parts_of(default_case(case)), parts_of(default_case(case, cpl))
    parts = {k: new[k] if k in new and old[k] == v else v for k, v in parts_of(case).items()}
    return case_of(case, parts)


def simpler_values(case: Case, probe: Probe) -> Case:
    """Registers that keep a value keep as few bits of it as possible."""
    default = parts_of(default_case(case))
    for key in differing_parts(case):
        if key[0] in _NUMBERS:
            case = _simpler(case, key, default.get(key, 0), probe)
    return case


def _simpler(case: Case, key: Key, default: int, probe: Probe) -> Case:
    value = parts_of(case)[key]
    number = smaller(value, default, lambda other: probe.keeps(with_parts(case, {key: other})))
    return with_parts(case, {key: number})
