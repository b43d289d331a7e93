"""One case in plain words: the instruction, the state before, and who says what about the state after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from emufuzz.arch.rflags import X86_EFLAGS_VM
from emufuzz.case.model import Case, Outcome
from emufuzz.report.columns import table
from emufuzz.report.disasm import disassemble
from emufuzz.report.fields import Row, disagreements, show_exception
from emufuzz.report.state import state_lines


class Opinion(NamedTuple):
    """What one oracle says about a case.

    `differences` names the fields in which it contradicts the subject; `notes` are sentences about
    what it does not vouch for. An opinion that does not `count` is shown but decides nothing. It is not
    `compared` where the subject refused the case.
    """

    name: str
    outcome: Outcome
    differences: tuple[str, ...]
    notes: tuple[str, ...] = ()
    counts: bool = True
    compared: bool = True


def explain(case: Case, name: str, outcome: Outcome, opinions: Sequence[Opinion], width: int) -> list[str]:
    """The whole explanation as lines."""
    lines = [_title(case, outcome), *_indent(disassemble(case)), "", "before:"]
    lines += _indent(state_lines(case, width - 2))
    lines += ["", "after:", f"  {name}: {summary(outcome)}"]
    for opinion in opinions:
        lines.append(f"  {opinion.name}: {summary(opinion.outcome)}")
    lines += ["", *(_verdict(name, opinion) for opinion in opinions)]
    rows = disagreements(case, [outcome, *(opinion.outcome for opinion in opinions)])
    if rows:
        lines += ["", *_table(rows, name, opinions, width)]
    notes = [f"{opinion.name}: {note}" for opinion in opinions for note in opinion.notes]
    if notes:
        lines += ["", "not compared:", *_indent(notes)]
    if outcome.crash:
        lines += ["", f"{name} crashed:", *_indent(outcome.crash.splitlines())]
    return lines


def summary(outcome: Outcome) -> str:
    """How an outcome ended, in one phrase."""
    if outcome.crash:
        return "crashed"
    if outcome.hang:
        return "did not come back"
    if outcome.exception is not None:
        return f"raises {show_exception(outcome.exception)}"
    if outcome.rc == "continue":
        return "completes"
    return f"ends as {outcome.rc}" + (f" ({outcome.reason})" if outcome.reason else "")


def cpl_of(case: Case) -> int:
    """The case's privilege level, as KVM's callbacks compute it."""
    if not case.system.cr0 & 1:
        return 0
    if case.rflags & X86_EFLAGS_VM:
        return 3
    return case.system.seg[2].dpl


def _title(case: Case, outcome: Outcome) -> str:
    leaf = f", opcode leaf {outcome.leaf}" if outcome.leaf else ""
    return f"case {case.id}: {case.mode}, CPL {cpl_of(case)}{leaf}"


def _verdict(name: str, opinion: Opinion) -> str:
    aside = "" if opinion.counts else " (for information; it does not decide)"
    if not opinion.compared:
        return f"{opinion.name} was not compared with {name}{aside}."
    if not opinion.differences:
        return f"{opinion.name} agrees with {name}{aside}."
    return f"{opinion.name} contradicts {name} on {', '.join(opinion.differences)}{aside}."


def _table(rows: Sequence[Row], name: str, opinions: Sequence[Opinion], width: int) -> list[str]:
    headers = ["field", "before", name, *(opinion.name for opinion in opinions)]
    return table(headers, [(row.name, row.before, *row.after) for row in rows], width)


def _indent(lines: Sequence[str]) -> list[str]:
    return ["  " + line if line else line for line in lines]
