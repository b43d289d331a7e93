"""What is said at the end of a run: the accounting, and what the new findings are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from emufuzz.case.paths import PATHS
from emufuzz.cli.screen.text import plural
from emufuzz.cli.screen.view import View
from emufuzz.fuzz.accounting import Totals
from emufuzz.fuzz.finding import Bucket, Finding, place_of
from emufuzz.fuzz.kvm.results import RESULTS
from emufuzz.oracle.compare import Difference
from emufuzz.report.disasm import mnemonic

#: New findings that are explained.
_EXPLAINED: Final = 10
#: Differences that are shown of each.
_DIFFERENCES: Final = 3


def progress_line(view: View) -> str:
    """How far a campaign is, in one line."""
    share = "" if view.budget is None else f" of {view.budget:,}"
    waiting = f", {view.to_shrink:,} to shrink" if view.to_shrink else ""
    return (
        f"{view.elapsed:6.0f} s  {view.cases:,} cases{share}  {view.rate_now or view.rate:,.0f}/s  "
        f"coverage {view.covered}/{view.coverable}  skipped {view.skipped:,}  "
        f"findings {view.buckets:,} ({view.new:,} new{waiting})"
    )


def accounting_lines(totals: Totals) -> Iterator[str]:
    """What became of all cases, and why some were skipped."""
    yield (
        f"{totals.cases:,} cases = {totals.agreed:,} agreed + {totals.skipped_cases:,} skipped "
        f"+ {sum(totals.bucket_cases.values()):,} in findings"
    )
    for reason, count in sorted(totals.skipped.items(), key=lambda item: (-item[1], item[0])):
        yield f"  skipped {count:>8,}  {reason}"


def result_lines(totals: Totals) -> Iterator[str]:
    """Per exit path, how often each result was seen, in the order of RESULTS."""
    for path in PATHS:
        seen = {name: count for (of, name), count in totals.results.items() if of == path}
        if seen:
            shown = "  ".join(f"{name} {seen[name]:,}" for name in RESULTS if name in seen)
            yield f"  {path:<25} {shown}"


def finding_lines(
    new: Sequence[Finding], shrunk: Mapping[Bucket, Finding], totals: Totals, directory: Path
) -> Iterator[str]:
    """The new findings, explained, each as it was shrunk.

    Args:
        new: Findings of this run.
        shrunk: What some of them were shrunk to.
        totals: The campaign's accounting.
        directory: Where findings are exported.
    """
    if not new:
        known = f", {len(totals.bucket_cases)} known ones seen again" if totals.bucket_cases else ""
        yield f"no new findings{known}"
        return
    yield f"{plural(len(new), 'new finding')} in {directory}"
    for finding in new[:_EXPLAINED]:
        yield ""
        yield from _explained(finding, shrunk, totals, directory)
    if len(new) > _EXPLAINED:
        yield ""
        yield f"... and {len(new) - _EXPLAINED} more in {directory}"


def _explained(
    finding: Finding, shrunk: Mapping[Bucket, Finding], totals: Totals, directory: Path
) -> Iterator[str]:
    bucket = finding.bucket
    shown = shrunk.get(bucket, finding)
    yield f"{headline(shown)}  ({totals.bucket_cases[bucket]:,} cases)"
    yield f"  {explanation(shown)}"
    yield f"  emufuzz repro {directory / bucket.name}.json"


def headline(finding: Finding) -> str:
    """A finding in a few words: leaf, mode, kind, instruction."""
    return f"{finding.leaf or '?'} in {place_of(finding.case)}: {finding.kind}: {mnemonic(finding.case)}"


def explanation(finding: Finding) -> str:
    """What differs, and by whose word."""
    shown = "; ".join(_difference(d) for d in finding.differences[:_DIFFERENCES])
    more = len(finding.differences) - _DIFFERENCES
    return shown + (f"; and {more} more" if more > 0 else "")


def _difference(difference: Difference) -> str:
    if difference.kind in ("crash", "hang"):
        lines = (difference.subject or difference.oracle).strip().splitlines() or [""]
        return (
            f"{difference.kind} of {difference.field}: {lines[-1 if lines[0].startswith('Traceback') else 0]}"
        )
    place = f"[{difference.at:#x}]" if difference.at is not None else difference.field
    return f"{place}: emulator {difference.subject}, oracle {difference.oracle}"
