"""The picture of a campaign: lines of text for a terminal of any size.

From top to bottom: what runs, the run and its cases, coverage and findings, then oracles, skipped cases,
workers and what happened last, which share the lines that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from rich.text import Text

from emufuzz.cli.screen.skips import Health, Skip
from emufuzz.cli.screen.text import (
    ASCII_BARS,
    BARS,
    mebibytes,
    number,
    percent,
    plural,
    sparkline,
)
from emufuzz.cli.screen.view import View, WorkerRow
from emufuzz.fuzz.finding import ALONE, FAILED, SPLIT
from emufuzz.report.plain import duration, printable

#: Columns from which on sections stand beside each other: the small ones, and all of them.
_TWO: Final = 72
_WIDE: Final = 132
_LABEL: Final = 13

_HEAD: Final = "bold cyan"
_DIM: Final = "dim"
_BAD: Final = "bold red"
_GOOD: Final = "bold green"


class Section(NamedTuple):
    """A titled part of the picture; rows beyond the space that it gets are left out.

    Attributes:
        title: Its title.
        rows: Its lines, the most important first.
        least: Rows that it needs to make sense.
    """

    title: str
    rows: list[Text]
    least: int = 1


Block = tuple[Section, ...]


def frame(
    view: View, latest: Sequence[str], width: int, height: int, *, ascii_only: bool = False
) -> list[Text]:
    """The picture: at most `height` lines of exactly `width` columns.

    Args:
        view: What to show.
        latest: What happened, the last of it at the end.
        width: Columns of the terminal.
        height: Its lines.
        ascii_only: Use no other characters.
    """
    bars = ASCII_BARS if ascii_only else BARS
    spark = max((width if width < _TWO else width // 2) - _LABEL - 3, 1)
    small = [(_run(view), _cases(view)), (_coverage(view, spark, bars), _findings(view))]
    large = [(_oracles(view), _workers(view)), (_skipped(view), _latest(latest))]
    blocks = _arranged(small, beside=width >= _TWO) + _arranged(large, beside=width >= _WIDE)
    lines = [_title(view)]
    for block, rows in zip(blocks, _shares(blocks, height - 1), strict=True):
        lines += _drawn(block, rows, width, "-" if ascii_only else "─")
    return [_fit(line, width) for line in lines[:height]]


def _arranged(pairs: Sequence[Block], *, beside: bool) -> list[Block]:
    return list(pairs) if beside else [(section,) for pair in pairs for section in pair]


def _shares(blocks: Sequence[Block], height: int) -> list[int]:
    """How many rows each block gets below its title; 0 if there is no space for any."""
    wanted = [max(len(section.rows) for section in block) for block in blocks]
    shares = []
    for block, most in zip(blocks, wanted, strict=True):
        least = min(max(section.least for section in block), most)
        shares.append(max(min(least, height - 1), 0))
        height -= 1 + shares[-1] if shares[-1] else 0
    while height > 0 and any(0 < share < most for share, most in zip(shares, wanted, strict=True)):
        for i, most in enumerate(wanted):
            if height > 0 and 0 < shares[i] < most:
                shares[i] += 1
                height -= 1
    return shares


def _drawn(block: Block, rows: int, width: int, rule: str) -> list[Text]:
    """A block's sections beside each other."""
    if not rows:
        return []
    inner = (width - 2 * (len(block) - 1)) // len(block)
    parts = [[_rule(section, inner, rule), *section.rows[:rows]] for section in block]
    lines = []
    for i in range(rows + 1):
        cells = [_fit(part[i].copy() if i < len(part) else Text(), inner) for part in parts]
        lines.append(Text("  ").join(cells))
    return lines


def _fit(line: Text, width: int) -> Text:
    line.no_wrap = True
    line.truncate(width, overflow="crop", pad=True)
    return line


def _rule(section: Section, width: int, rule: str) -> Text:
    head = Text(f"{rule * 2} {section.title} ", style=_HEAD)
    head.append(rule * max(width - head.cell_len, 0), style=_DIM)
    return head


def _row(label: str, value: str | Text) -> Text:
    return Text.assemble((f" {label:<{_LABEL}}", _DIM), value)


def _title(view: View) -> Text:
    subject = view.subject
    config = subject.config
    bug = f"  bug {config.bug}" if config.bug else ""
    where = f"  {subject.directory}"
    text = f"emufuzz  {config.subject} against {', '.join(config.oracles)}  seed {config.seed}{bug}{where}"
    return Text(printable(text), style="bold")


def _run(view: View) -> Section:
    left = "until Ctrl-C" if _endless(view) else "-" if view.left is None else duration(view.left)
    rows = [
        _row("run time", duration(view.elapsed)),
        _row("of all runs", duration(view.total_elapsed)),
        _row("left", left),
        _row("to shrink", plural(view.to_shrink, "finding")),
    ]
    return Section("run", rows, 4)


def _endless(view: View) -> bool:
    return view.budget is None and view.subject.limits.seconds is None


def _ago(seconds: float | None) -> str:
    return "none yet" if seconds is None else f"{duration(seconds)} ago"


def _cases(view: View) -> Section:
    share = "" if view.budget is None else f" ({percent(view.cases, view.budget)})"
    rows = [
        _row("done", f"{view.cases:,}{share}"),
        _row("budget", "none" if view.budget is None else f"{view.budget:,}"),
        _row("throughput", f"{view.rate_now:,.0f}/s, mean {view.rate:,.0f}/s"),
        _row("agreed", f"{view.agreed:,} ({percent(view.agreed, view.cases)})"),
    ]
    return Section("cases", rows, 4)


def _coverage(view: View, width: int, bars: str) -> Section:
    covered = f"{view.covered:,} of {view.coverable:,} ({percent(view.covered, view.coverable)})"
    growth = Text(sparkline(view.coverage.columns(width), bars), style="green")
    rows = [_row("covered", covered), _row("growth", growth), _row("last new", _ago(view.since_coverage))]
    return Section("coverage: leaves x modes", rows, 3)


def _findings(view: View) -> Section:
    buckets = Text(f"{view.buckets:,} in all, ")
    buckets.append(f"{view.new:,} new", style=_BAD if view.new else _GOOD)
    shown = [f"{view.verdicts[name]:,} {name}" for name in (ALONE, SPLIT, FAILED) if name in view.verdicts]
    rows = [
        _row("buckets", buckets),
        _row("verdicts", ", ".join(shown) or "-"),
        _row("last new", _ago(view.since_finding)),
    ]
    return Section("findings", rows, 3)


def _oracles(view: View) -> Section:
    head = Text(f" {'':<24}{'compared':>10}{'gaps':>10}{'beyond':>10}{'broken':>10}", style=_DIM)
    rows = [head, *(_oracle(health, view.cases) for health in view.oracles)]
    title = f"oracles: {view.compared:,} compared ({percent(view.compared, view.cases)})"
    return Section(title, rows, 1 + len(view.oracles))


def _oracle(health: Health, cases: int) -> Text:
    name = printable(f"{health.name} {health.version}")
    compared = "-" if health.compared is None else percent(health.compared, cases)
    counts = f"{number(health.gaps):>10}{number(health.beyond):>10}"
    row = Text(f" {name[:23]:<24}{compared:>10}{counts}")
    row.append(f"{number(health.broken):>10}", style=_BAD if health.broken else "")
    return row


def _skipped(view: View) -> Section:
    title = "skipped"
    if view.skips:
        share = percent(view.skipped, view.cases)
        title = f"skipped: {view.skipped:,} ({share}), {plural(len(view.skips), 'reason')}"
    return Section(title, [_skip(skip) for skip in view.skips] or [Text(" none", style=_DIM)])


def _skip(skip: Skip) -> Text:
    return Text.assemble(f" {skip.cases:>12,}  ", (f"{skip.kind:<8}", _DIM), printable(skip.reason))


def _workers(view: View) -> Section:
    title = f"workers: {len(view.workers)}, {view.restarts} restarted"
    head = Text(
        f" {'process':<16}{'doing':<9}{'batch':>8}{'case':>7}  {'phase':<10}{'memory':>10}{'restarts':>9}",
        style=_DIM,
    )
    rows = [head, *(_worker(worker) for worker in view.workers)]
    return Section(title, rows, min(len(rows), 3))


def _worker(worker: WorkerRow) -> Text:
    place = f"{number(worker.batch):>8}{number(worker.case):>7}  {worker.phase or '-':<10}"
    row = Text(f" {printable(worker.name)[-15:]:<16}{worker.doing:<9}{place}{mebibytes(worker.rss):>10}")
    row.append(f"{worker.restarts:>9,}", style=_BAD if worker.restarts else "")
    return row


def _latest(latest: Sequence[str]) -> Section:
    rows = [Text(f" {printable(line)}") for line in reversed(latest)]
    return Section("what happened last", rows or [Text(" nothing to report", style=_DIM)])
