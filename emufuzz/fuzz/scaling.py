"""What more workers are worth: campaigns of one and of several take turns; and the memory that they need."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

import msgspec

from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.engines import campaign_versions
from emufuzz.fuzz.shrink import Limits as ShrinkLimits
from emufuzz.fuzz.store import Store
from emufuzz.fuzz.workers.local import LocalPool, resident

#: The part of a campaign after which its memory counts: caches are full, and nothing has grown yet.
EARLY: Final = 0.1
_OWN: Final = 0  # what `resident` takes for this process


class Measured(msgspec.Struct):
    """One campaign.

    Attributes:
        workers: How many.
        cases: How many it has run.
        rate: Cases per second from the first merged batch on, so that starts do not count.
        early_mib, late_mib: Resident memory of driver and workers in MiB, at EARLY of the cases and last.
    """

    workers: int
    cases: int
    rate: float
    early_mib: float
    late_mib: float

    @property
    def growth(self) -> float:
        """By which part of what it was the memory has grown."""
        return self.late_mib / self.early_mib - 1 if self.early_mib else 0.0


class Scaling(msgspec.Struct):
    """Pairs of campaigns, each of one worker and of several."""

    one: list[Measured]
    several: list[Measured]

    @property
    def speedup(self) -> float:
        """Median over the pairs of how many times as fast several workers are."""
        return median(b.rate / a.rate for a, b in zip(self.one, self.several, strict=True))

    @property
    def growth(self) -> float:
        """The largest growth of memory in any of them."""
        return max(each.growth for each in (*self.one, *self.several))


class _Watch:
    """Notes when the first batch was merged, and the memory at two places."""

    def __init__(self, cases: int) -> None:
        self._cases = cases
        self.first: tuple[int, float] | None = None
        self.early = self.late = 0.0

    def __call__(self, campaign: Campaign) -> None:
        done = campaign.totals.cases
        if self.first is None and done:
            self.first = done, time.monotonic()
        memory = sum(state.rss for state in campaign.pool.states()) + resident(_OWN)
        if done >= EARLY * self._cases and not self.early:
            self.early = memory / (1 << 20)
        if done < self._cases:  # behind that workers end
            self.late = memory / (1 << 20)


def measure(config: CampaignConfig, workers: int, cases: int) -> Measured:
    """Run a campaign in a directory of its own, with a store and with shrinking, as a user would.

    Raises:
        OracleUnavailableError: An oracle cannot work here.
        StoreError: There is no room for it.
    """
    setup, watch = config.setup(), _Watch(cases)
    with tempfile.TemporaryDirectory(prefix="emufuzz-bench-") as directory:
        store = Store.create(Path(directory) / "campaign", config, cases)
        try:
            store.begin(f"local:{workers}", campaign_versions(config.subject, config.oracles[1:]))
            campaign = Campaign(setup, Limits(cases), LocalPool(setup, workers), store, ShrinkLimits())
            totals = campaign.run(watch)
            ended = time.monotonic()
        finally:
            store.close()
    done, began = watch.first or (0, ended)
    rate = (totals.cases - done) / max(ended - began, 1e-9)
    return Measured(workers, totals.cases, rate, watch.early, watch.late)


def scaling(config: CampaignConfig, workers: int, cases: int, rounds: int) -> Scaling:
    """Pairs of campaigns, of which each has the other one go first in turn. Errors as of `measure`."""
    found = Scaling([], [])
    for number in range(rounds):
        order = (found.one, 1), (found.several, workers)
        for where, count in order if number % 2 == 0 else order[::-1]:
            where.append(measure(config, count, cases))
    return found
