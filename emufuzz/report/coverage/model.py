"""What was tested, as reports have it: of a campaign's directory, of cases that were run, or of a report.

Nothing in it but `elapsed` depends on when or where something ran, so that reports of the same campaign, run
twice, are the same but for that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import msgspec

from emufuzz.arch.leaves import LEAVES
from emufuzz.arch.modes import MODES
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.cells import OK, Cell, cell_of
from emufuzz.fuzz.judging import Judged
from emufuzz.fuzz.store import StoreView
from emufuzz.report.coverage.growth import Moment, Point, over_cases, over_time

#: As `where` of an entry: nobody noted where its first case is.
NOWHERE: Final = ""


class Entry(msgspec.Struct):
    """What is counted of a cell.

    Attributes:
        cases: How many cases.
        findings: How many of them are in findings.
        where: The first one: `BATCH:PLACE` in a campaign, `FILE:LINE` else; NOWHERE if unknown.
        code: Its code bytes.
    """

    cases: int = 0
    findings: int = 0
    where: str = NOWHERE
    code: bytes = b""


class Coverage(msgspec.Struct):
    """What was tested.

    Attributes:
        title: What it was, in a line.
        modes: Modes that could occur.
        entries: What is counted of each cell.
        oracles: Those that were asked; none of cases that were only run.
        verdicts, fields: What they judged (emufuzz.fuzz.judging).
        buckets: Findings: how many there are.
        growth: How it came about, over the cases; empty unless a campaign.
        elapsed: The same over the time that it took, which is all that depends on the machine.
        campaign: Whether `where` are places in a campaign.
    """

    title: str
    modes: tuple[str, ...] = MODES
    entries: dict[Cell, Entry] = {}
    oracles: tuple[str, ...] = ()
    verdicts: Judged = {}
    fields: Judged = {}
    buckets: int = 0
    growth: list[Point] = []
    elapsed: list[Moment] = []
    campaign: bool = False

    @property
    def cases(self) -> int:
        """All cases."""
        return sum(entry.cases for entry in self.entries.values())

    def leaves(self) -> set[str]:
        """Leaves of the opcode tables that occurred."""
        return {cell.leaf for cell in self.entries if cell.leaf in LEAVES}

    def add_case(self, case: Case, outcome: Outcome, where: str) -> None:
        """Count a case that was run."""
        cell = Cell(*cell_of(case, outcome))
        entry = self.entries.get(cell)
        if entry is None:
            entry = self.entries[cell] = Entry(where=where, code=case.code)
        entry.cases += 1


def is_exception(outcome: str) -> bool:
    """Whether the name of an outcome is that of an exception."""
    return outcome.startswith(("#", "vector ")) or outcome == "NMI"


class Group(NamedTuple):
    """Some cells together.

    Attributes:
        cells: How many there are.
        cases: Cases in them.
        outcomes, exceptions: How many different ones they have.
        findings: Cases in findings.
        leaves: How many different leaves of the tables.
    """

    cells: int
    cases: int
    outcomes: int
    exceptions: int
    findings: int
    leaves: int


def grouped(entries: Iterable[tuple[Cell, Entry]]) -> Group:
    """The sums of some cells."""
    items = list(entries)
    outcomes = {cell.outcome for cell, _ in items if cell.outcome}
    return Group(
        len(items),
        sum(entry.cases for _, entry in items),
        len(outcomes),
        sum(map(is_exception, outcomes)),
        sum(entry.findings for _, entry in items),
        len({cell.leaf for cell, _ in items if cell.leaf in LEAVES}),
    )


def coverage_of(view: StoreView) -> Coverage:
    """What a campaign has tested, at one moment.

    Raises:
        StoreError: It is damaged.
    """
    with view.snapshot():
        totals, cells, config = view.totals(), view.cells(), view.config()
        found = view.rows("SELECT batch, idx FROM findings")
        merges, seconds = view.elapsed(), view.seconds()
    where = {cell: f"{c.batch}:{c.index}" if c.batch >= 0 else NOWHERE for cell, c in cells.items()}
    what = f"{config.subject} against {', '.join(config.oracles)}"
    bug = f", seeded bug {config.bug}" if config.bug else ""
    return Coverage(
        title=f"{what}, seed {config.seed}{bug}",
        modes=config.modes,
        entries={cell: Entry(c.cases, c.findings, where[cell], c.code) for cell, c in sorted(cells.items())},
        oracles=config.oracles,
        verdicts=dict(sorted(totals.verdicts.items())),
        fields=dict(sorted(totals.fields.items())),
        buckets=len(totals.bucket_cases),
        growth=list(over_cases(totals.cases, cells, found)),
        elapsed=list(over_time(cells, found, merges, seconds)),
        campaign=True,
    )


def ok_share(entries: Iterable[tuple[Cell, Entry]]) -> tuple[int, int]:
    """(cases that completed, all cases)."""
    items = list(entries)
    return sum(e.cases for c, e in items if c.outcome == OK), sum(e.cases for _, e in items)
