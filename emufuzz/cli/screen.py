"""What `emufuzz fuzz` shows: a live screen on a terminal, log lines otherwise, a summary at the end."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Final, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from emufuzz.fuzz.campaign import Campaign, Limits, Totals, coverable
from emufuzz.fuzz.loop import Finding
from emufuzz.fuzz.store import Store
from emufuzz.oracle.compare import Difference
from emufuzz.report.disasm import mnemonic

#: Seconds between two log lines.
LOG_INTERVAL: Final = 5.0
#: Rows of findings and of skip reasons on the screen.
_SHOWN: Final = 8
#: New findings that the summary explains.
_EXPLAINED: Final = 10


class Screen:
    """The view of one campaign; a context manager around its run."""

    def __init__(
        self, campaign: Campaign, store: Store, modes: tuple[str, ...], workers: int, limits: Limits
    ) -> None:
        self._campaign = campaign
        self._store = store
        self._workers = workers
        self._limits = limits
        self._coverable = coverable(modes)
        self._console = Console(highlight=False, soft_wrap=True)
        self._started = time.monotonic()
        self._logged = self._started
        self._known = 0
        self._live: Live | None = None

    def __enter__(self) -> Self:
        self._started = self._logged = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def update(self, campaign: Campaign) -> None:
        """Show where the campaign is."""
        if self._live is not None:
            self._live.update(self._picture(campaign.totals))
            return
        now = time.monotonic()
        for finding in campaign.totals.new[self._known :]:
            self._print(f"finding  {headline(finding)}")
        self._known = len(campaign.totals.new)
        if now - self._logged >= LOG_INTERVAL:
            self._logged = now
            self._print(self._line(campaign.totals))

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False)

    def _line(self, totals: Totals) -> str:
        rate = totals.cases / max(self._elapsed, 1e-9)
        return (
            f"{self._elapsed:6.0f} s  {totals.cases:,} cases  {rate:,.0f}/s  "
            f"coverage {totals.covered()}/{self._coverable}  skipped {totals.skipped_cases:,}  "
            f"findings {len(totals.findings)} ({len(totals.new)} new)"
        )

    def _picture(self, totals: Totals) -> RenderableType:
        health = f"{self._campaign.workers_alive}/{self._workers} workers, {totals.restarts} restarted"
        head = Text(f"emufuzz fuzz  {self._line(totals).strip()}\n{health}")
        return Group(head, _bucket_table(totals), _skip_table(totals))

    def summary(self, *, interrupted: bool) -> None:
        """The accounting, and what the new findings are."""
        totals = self._campaign.totals
        state = "stopped" if interrupted else "done"
        self._print(f"{state}: {self._line(totals).strip()}")
        self._print(
            f"{totals.cases:,} cases = {totals.agreed:,} agreed + {totals.skipped_cases:,} skipped "
            f"+ {sum(totals.bucket_cases.values()):,} in findings"
        )
        for reason, count in sorted(totals.skipped.items(), key=lambda item: (-item[1], item[0])):
            self._print(f"  skipped {count:>8,}  {reason}")
        self._explain(totals)

    def _explain(self, totals: Totals) -> None:
        if not totals.new:
            known = f", {len(totals.findings)} known ones seen again" if totals.findings else ""
            self._print(f"no new findings{known}")
            return
        self._print(f"{len(totals.new)} new findings in {self._store.findings}")
        for finding in totals.new[:_EXPLAINED]:
            self._print("")
            self._print(f"{headline(finding)}  ({totals.bucket_cases[finding.bucket]:,} cases)")
            self._print(f"  {explanation(finding)}")
            self._print(f"  emufuzz repro {self._store.path_of(finding.bucket)}")
        more = len(totals.new) - _EXPLAINED
        if more > 0:
            self._print(f"\n... and {more} more in {self._store.findings}")


def headline(finding: Finding) -> str:
    """A finding in a few words: leaf, mode, kind, instruction."""
    return f"{finding.leaf or '?'} in {finding.mode}: {finding.kind}: {mnemonic(finding.case)}"


def explanation(finding: Finding) -> str:
    """What differs, and by whose word."""
    shown = "; ".join(_difference(d) for d in finding.differences[:3])
    more = len(finding.differences) - 3
    return shown + (f"; and {more} more" if more > 0 else "")


def _difference(difference: Difference) -> str:
    if difference.kind in ("crash", "hang"):
        lines = (difference.subject or difference.oracle).strip().splitlines() or [""]
        return (
            f"{difference.kind} of {difference.field}: {lines[-1 if lines[0].startswith('Traceback') else 0]}"
        )
    place = f"[{difference.at:#x}]" if difference.at is not None else difference.field
    return f"{place}: emulator {difference.subject}, oracle {difference.oracle}"


def _bucket_table(totals: Totals) -> Table:
    table = Table("leaf", "mode", "kind", "cases", title="findings", title_justify="left", expand=False)
    buckets = sorted(totals.bucket_cases.items(), key=lambda item: (-item[1], item[0]))
    for (leaf, mode, kind), count in buckets[:_SHOWN]:
        table.add_row(leaf, mode, kind, f"{count:,}")
    return table


def _skip_table(totals: Totals) -> Table:
    table = Table("skipped", "cases", title_justify="left", expand=False)
    for reason, count in sorted(totals.skipped.items(), key=lambda item: (-item[1], item[0]))[:_SHOWN]:
        table.add_row(reason, f"{count:,}")
    return table
