"""What a quirk about an exception leaves alone: the part of an outcome that a comparison does not reach.

When only one side faults, or both do in another way, `compare` reports the exception alone, since the
rest follows from it. A quirk that explains this exception must not hide what follows from something else:
a fault leaves the state as it was, and what completes has changed no more than it may.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from emufuzz.case.model import Case, Outcome, System

if TYPE_CHECKING:
    from emufuzz.oracle.compare import Difference


class Scope(NamedTuple):
    """What goes with a quirk about an exception.

    Attributes:
        system: Fields of System that an instruction may have changed if it completed.
        memory: Whether memory may have changed before a fault.
    """

    system: frozenset[str] = frozenset()
    memory: bool = False


# fmt: off
SCOPES: Final = {
    "kvm-quirk-01-canonical-straddle":   Scope(memory=True),
    "kvm-quirk-02-above-4g":             Scope(memory=True),
    "kvm-quirk-02-wrap":                 Scope(frozenset(("fpu", "seg")), memory=True),
    "kvm-quirk-05-stack-override":       Scope(),
    "kvm-quirk-16-segment-source-first": Scope(),
    "kvm-quirk-19-vm86-cli-sti":         Scope(),
    "kvm-quirk-20-vm86-pushf-popf":      Scope(),
    "kvm-quirk-21-enter":                Scope(memory=True),
    "kvm-quirk-22-69-real-interrupt":    Scope(memory=True),
    "kvm-quirk-23-iret-real":            Scope(),
    "kvm-quirk-30-privilege-first":      Scope(),
    "kvm-quirk-37-system-descriptor":    Scope(),
    "kvm-quirk-41-movntdq-register":     Scope(frozenset(("fpu",))),
    "kvm-quirk-41-prefetch-register":    Scope(),
    "kvm-quirk-42-movsxd-16":            Scope(),
    "kvm-quirk-43-limit-first":          Scope(),
    "kvm-quirk-43-table-read":           Scope(frozenset(("gdtr", "idtr"))),
    "kvm-quirk-44-short-image":          Scope(frozenset(("fpu",))),
    "kvm-quirk-48-lost-batch":           Scope(),
    "kvm-quirk-72-read-before-check":    Scope(),
    "kvm-unreadable-bitmap":             Scope(),
    "kvm-vmcb-address-first":            Scope(),
    "kvm-lldt-in-ldt":                   Scope(frozenset(("seg",))),
    "kvm-prefixed-xsetbv":               Scope(frozenset(("xcr0",))),
    "kvm-rex-r-segment-register":        Scope(),
}
# fmt: on


def rest_is_kept(
    quirk: str, case: Case, subject: Outcome, oracle: Outcome, differences: Sequence[Difference]
) -> bool:
    """Whether nothing but the exception, and what goes with it, is different in a case without paths.

    True for quirks that are not about exceptions, and where both sides fault alike or not at all.
    """
    scope = SCOPES.get(quirk)
    if scope is None or _vector(subject) == _vector(oracle):
        return True
    if any(not _expected(difference.field, scope) for difference in differences):
        return False
    if subject.exception is not None:
        return _kept_by_fault(case, subject, scope)
    return _changed(case.system, subject.system) <= scope.system


def _vector(outcome: Outcome) -> int | None:
    return None if outcome.exception is None else outcome.exception[0]


def _expected(field: str, scope: Scope) -> bool:
    return field.startswith("exception") or (field == "mem" and scope.memory)


def _kept_by_fault(case: Case, subject: Outcome, scope: Scope) -> bool:
    """SDM Vol. 3A 6.5: a fault leaves the state as it was; a repeated instruction may have come far."""
    if subject.pages and not scope.memory:
        return False
    if subject.system.fpu != case.system.fpu:
        return False
    if subject.gpr != case.gpr and not subject.restarts:
        return False
    return subject.rip == case.rip and subject.rflags == case.rflags and _same_bases(case, subject)


def _same_bases(case: Case, subject: Outcome) -> bool:
    """Data segments as they were; far calls may have loaded CS (docs/porting.md)."""
    before, after = case.system.seg, subject.system.seg
    return before is after or all(before[n] == after[n] for n in _DATA_SEGMENTS)


#: ES, SS, DS, FS, GS.
_DATA_SEGMENTS: Final = (0, 2, 3, 4, 5)


def _changed(before: System, after: System) -> set[str]:
    if before is after:
        return set()
    return {name for name in System.__struct_fields__ if getattr(before, name) != getattr(after, name)}
