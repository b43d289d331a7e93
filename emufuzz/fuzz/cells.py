"""What a campaign has tested, in cells: leaf, mode, CPL, outcome and exit path of its cases.

A cell knows how many cases it has, how many of them are in findings, and where its first case is, so
that this case can be generated again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple, TypeAlias

import msgspec

from emufuzz.arch.exceptions import exception_name
from emufuzz.arch.regs import VCPU_SREG_SS
from emufuzz.case.model import Case, Outcome

#: Outcomes that are neither an exception's name (`#GP`) nor an X86EMUL_* result (`unhandleable`).
OK: Final = "ok"
CRASH: Final = "crash"
HANG: Final = "hang"
NO_EXIT: Final = "no-exit"

#: CPL of cases that an older emufuzz counted, which did not note it; nor did it their outcome.
UNKNOWN_CPL: Final = -1

#: A cell as a plain tuple, which is what costs little in the campaign's loop.
CellKey: TypeAlias = tuple[str, str, int, str, str]


class Cell(NamedTuple):
    """One cell.

    Attributes:
        leaf: As the decoder found it; empty if the instruction was not decoded.
        mode: One of MODES.
        cpl: 0..3 before the instruction; UNKNOWN_CPL if it was not noted.
        outcome: `ok`, an exception's name, `no-exit`, `crash`, `hang`, else the emulator's result.
        path: The exit path; empty for cases on flat memory.
    """

    leaf: str
    mode: str
    cpl: int
    outcome: str
    path: str


class Tally(msgspec.Struct, gc=False):
    """What is counted of a cell.

    Attributes:
        cases: How many there are.
        findings: How many of them are in findings.
        index: The place of the first one in its batch.
        code: Its code bytes.
    """

    cases: int = 0
    findings: int = 0
    index: int = 0
    code: bytes = b""


class CellCount(Tally):
    """What is counted of a cell in a whole campaign: `batch` is that of its first case, -1 if unknown."""

    batch: int = -1


Tallies: TypeAlias = dict[CellKey, Tally]


def cpl_of(case: Case) -> int:
    """The CPL of a case: 0 in real mode, 3 in virtual-8086 mode, else SS.DPL (SDM Vol. 3A 5.5)."""
    mode = case.mode
    return 3 if mode == "vm86" else 0 if mode == "real" else case.system.seg[VCPU_SREG_SS].dpl


def outcome_name(outcome: Outcome) -> str:
    """How a case ended, in one word.

    A crash or hang outweighs all else. On exit paths the exception is the one that waits for the guest.
    """
    if outcome.crash or outcome.hang:
        return CRASH if outcome.crash else HANG
    if outcome.exception is not None:
        return exception_name(outcome.exception[0])
    if outcome.extra is not None:
        if "no_exit" in outcome.extra:
            return NO_EXIT
        for queued in outcome.extra.get("injected", ()):
            return exception_name(queued["vector"])
    return OK if outcome.rc == "continue" else outcome.rc


def cell_of(case: Case, outcome: Outcome) -> CellKey:
    """The cell of a case."""
    return outcome.leaf, case.mode, cpl_of(case), outcome_name(outcome), case.path or ""


def cells_of(cases: Sequence[Case], outcomes: Sequence[Outcome]) -> list[CellKey]:
    """The cell of each case."""
    cells = []
    for case, outcome in zip(cases, outcomes, strict=True):
        # Most cases are these; the rest may cost more.
        if outcome.rc == "continue" and outcome.exception is None and outcome.extra is None:
            name = CRASH if outcome.crash else HANG if outcome.hang else OK
        else:
            name = outcome_name(outcome)
        cells.append((outcome.leaf, case.mode, cpl_of(case), name, case.path or ""))
    return cells


def add_cells(tallies: Tallies, cases: Sequence[Case], outcomes: Sequence[Outcome], first: int) -> None:
    """Count cases whose places in their batch begin at `first`; places have to come in order."""
    for index, cell in enumerate(cells_of(cases, outcomes), first):
        tally = tallies.get(cell)
        if tally is None:
            tallies[cell] = Tally(1, 0, index, cases[index - first].code)
        else:
            tally.cases += 1


def add_tallies(total: Tallies, part: Tallies) -> None:
    """Add what was counted of other cases of the same batch."""
    for cell, more in part.items():
        tally = total.get(cell)
        if tally is None:
            total[cell] = more
            continue
        tally.cases += more.cases
        tally.findings += more.findings
        if more.index < tally.index:
            tally.index, tally.code = more.index, more.code
