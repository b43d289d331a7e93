"""The vocabulary of the rules: what a rule is, what it finds, and how tables declare them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

from emufuzz.arch.exceptions import exception_name
from emufuzz.case.model import Case, Fault, Outcome
from emufuzz.oracle.rules.decoded import Decoded
from emufuzz.oracle.rules.view import View

#: When an exception is looked for (SDM Vol. 3A Table 6-2, and the order of the operations in Vol. 2):
#: of two that are due the one of the earlier phase comes; within one the processor chooses.
FETCH: Final = 0
DECODE: Final = 1
PRIVILEGE: Final = 2
ACCESS: Final = 3
VALUE: Final = 4

#: Which outcomes a rule is for.
FAULT: Final = "fault"  # it demands an exception
COMPLETED: Final = "completed"
FAULTED: Final = "faulted"
EVENTS: Final = "events"  # what was accessed on the way: callbacks, or a device trace
UNCAUSED: Final = "uncaused"  # an exception that no FAULT rule demands
ANY: Final = "any"


class Violation(NamedTuple):
    """What breaks a rule: `field` as in compare.Difference, what is demanded, what was found instead."""

    rule: str
    field: str
    demand: str
    found: str


class Found(NamedTuple):
    """What a check found wrong, without the rule's own words."""

    field: str
    found: str
    demand: str = ""


Due = Callable[[View], "Fault | bool | None"]
Check = Callable[[View, Outcome], "Found | None"]
Encoding = Callable[[Decoded], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """One demand of the SDM.

    Attributes:
        id: Name in reports.
        kind: FAULT, COMPLETED, FAULTED, EVENTS or ANY.
        citation: Volume and section.
        demand: What must be so, in words.
        mnemonics: iced's mnemonics it is about; None for all.
        encoding: Further condition on the bytes alone; None for none.
        phase: FETCH .. VALUE, of a FAULT.
        fault: The exception of a FAULT whose `due` says only yes.
        due: Of a FAULT: the exception that must come for this state, True for `fault`, or nothing.
        finds: Of other kinds: what is wrong with an outcome.
    """

    id: str
    kind: str
    citation: str
    demand: str
    mnemonics: frozenset[int] | None = None
    encoding: Encoding | None = None
    phase: int = VALUE
    fault: Fault | None = None
    due: Due | None = None
    finds: Check | None = None

    def selects(self, insn: Decoded) -> bool:
        """Whether the rule is about instructions encoded like this."""
        if self.mnemonics is not None and insn.mnemonic not in self.mnemonics:
            return False
        return self.encoding is None or self.encoding(insn)

    def demanded(self, view: View) -> Fault | None:
        """The exception that this FAULT rule demands in this state."""
        if self.due is None:
            return None
        due = self.due(view)
        return self.fault if due is True else due or None

    def applies(self, view: View) -> bool:
        """Whether the rule demands anything of the case."""
        return self.selects(view.insn) and (self.kind != FAULT or self.demanded(view) is not None)

    def check(self, case: Case, outcome: Outcome) -> Violation | None:
        """The rule's own verdict on an outcome, as if it were the only rule."""
        view = View(case)
        if not self.selects(view.insn):
            return None
        if self.kind == FAULT:
            wanted = self.demanded(view)
            return None if wanted is None else mismatch(self, wanted, outcome.exception)
        if not concerns(self.kind, outcome) or self.finds is None:
            return None
        found = self.finds(view, outcome)
        return None if found is None else self.violation(found)

    def violation(self, found: Found) -> Violation:
        """The violation that a check has found."""
        return Violation(self.id, found.field, found.demand or self.demand, found.found)


def completed(outcome: Outcome) -> bool:
    """The instruction ran to its end; a trap may follow it."""
    return outcome.exception is None


def concerns(kind: str, outcome: Outcome) -> bool:
    """Whether rules of this kind are about such an outcome."""
    if kind == COMPLETED:
        return outcome.exception is None
    if kind in {FAULTED, UNCAUSED}:
        return outcome.exception is not None
    return kind == ANY or bool(outcome.events) or bool(outcome.extra)


def show_fault(fault: Fault | None) -> str:
    """An exception as reports name it: `#GP(0x10)`, `#PF(0x2) at 0xb000`."""
    if fault is None:
        return "no exception"
    vector, code, address = fault
    text = exception_name(vector) + ("" if code is None else f"({code:#x})")
    return text if address is None else f"{text} at {address:#x}"


def mismatch(rule: Rule, wanted: Fault, found: Fault | None) -> Violation | None:
    """The violation if the exception that came is another one; the most specific field that differs."""
    if found == wanted:
        return None
    field = "exception"
    if found is not None and found[0] == wanted[0]:
        field = "exception.error_code" if found[1] != wanted[1] else "exception.address"
    return Violation(rule.id, field, f"{show_fault(wanted)}: {rule.demand}", show_fault(found))
