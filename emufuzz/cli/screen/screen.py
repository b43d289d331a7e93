"""The screen of one run: hears from the campaign, and tells an output."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from emufuzz.cli.screen.events import (
    Found,
    Incident,
    Restart,
    done_of,
    failure_of,
    found_of,
    idle_restart,
    shrunk_of,
    start_of,
)
from emufuzz.cli.screen.outputs import Output, output_for
from emufuzz.cli.screen.summary import accounting_lines, finding_lines, progress_line, result_lines
from emufuzz.cli.screen.view import Subject, View, Watch
from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.finding import Bucket, Finding
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.store import Store
from emufuzz.fuzz.tasks import Done, Failure, ShrinkTask
from emufuzz.report.plain import printable


class Screen:
    """The view of one campaign; a context manager around its run.

    While it is open SIGTERM ends the campaign as Ctrl-C does, so that the terminal is given back.
    """

    def __init__(
        self, campaign: Campaign, store: Store, limits: Limits, *, as_json: bool, output: Output | None = None
    ) -> None:
        self._campaign = campaign
        self._store = store
        self._output = output or output_for(sys.stdout, as_json=as_json)
        run = store.runs()[-1]
        self._run_started = str(run["started"])
        subject = Subject(str(store.directory), store.config(), run["versions"], limits)
        self._watch = Watch(subject, store.history())
        self._shown = 0.0
        self._told = 0
        self._restarts = 0
        self._shrunk: dict[Bucket, Finding] = {}
        self._sigterm: Any = None
        self._last = self._watch.view(campaign)

    def __enter__(self) -> Self:
        campaign = self._campaign
        campaign.on_said = self._hear
        self._watch.begin(campaign)
        self._sigterm = signal.signal(signal.SIGTERM, signal.default_int_handler)
        self._output.start(start_of(self._watch.view(campaign), self._run_started, campaign.pool.size))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        signal.signal(signal.SIGTERM, self._sigterm)
        self._last = self._watch.view(self._campaign)
        self._output.stop()
        if value is not None:
            self._done("failed", str(value) or type(value).__name__)

    def update(self, campaign: Campaign) -> None:
        """Show what happened since the last time, and from time to time where the campaign is."""
        self._watch.sample(campaign)
        self._tell_news()
        if campaign.elapsed - self._shown >= self._output.every:
            self._shown = campaign.elapsed
            self._output.progress(self._watch.view(campaign))

    def _hear(self, said: Done | Failure) -> None:
        """What a worker said to the campaign."""
        elapsed, task = self._campaign.elapsed, said.task
        if isinstance(said, Failure):
            event = failure_of(elapsed, said)
            self._restarts += isinstance(event, Restart)
            self._tell(event)
        elif isinstance(task, ShrinkTask) and isinstance(said.value, Shrunk):
            bucket = task.finding.bucket
            self._shrunk[bucket] = said.value.finding
            self._tell(shrunk_of(elapsed, bucket, said.value, str(self._store.path_of(bucket))))

    def _tell_news(self) -> None:
        """New findings, and workers that ended without a task."""
        campaign = self._campaign
        for finding in campaign.new[self._told :]:
            self._tell(self._found(finding))
        self._told = len(campaign.new)
        for _ in range(campaign.pool.restarts - self._restarts):
            self._tell(idle_restart(campaign.elapsed))
        self._restarts = max(self._restarts, campaign.pool.restarts)

    def _found(self, finding: Finding) -> Found:
        return found_of(self._campaign.elapsed, finding, str(self._store.path_of(finding.bucket)))

    def _tell(self, event: Incident) -> None:
        self._output.incident(event)

    def summary(self, *, interrupted: bool) -> None:
        """The accounting, and what the new findings are."""
        self._tell_news()
        state = "stopped" if interrupted else "done"
        self._done(state, "")
        if not self._output.words:
            return
        totals = self._campaign.totals
        print(f"{state}: {progress_line(self._at_end()).strip()}")
        for line in (
            *accounting_lines(totals),
            *result_lines(totals),
            *finding_lines(self._campaign.new, self._shrunk, totals, self._store.findings),
        ):
            print(printable(line))

    def _done(self, state: str, reason: str) -> None:
        self._output.done(done_of(self._at_end(), self._campaign.totals, state, reason))

    def _at_end(self) -> View:
        """The campaign when its run ended, with those new findings that are still new."""
        return replace(self._last, new=len(self._campaign.new))
