"""A campaign that does what a test says, at the times that it says."""

from __future__ import annotations

from emufuzz.case.build import build_case
from emufuzz.fuzz.accounting import BatchResult, Totals
from emufuzz.fuzz.cells import Tally
from emufuzz.fuzz.finding import ALONE, Finding
from emufuzz.fuzz.tasks import WorkerState
from emufuzz.oracle.compare import Difference


class FakePool:
    """Workers that are what they are said to be."""

    def __init__(self, *names):
        self.names = list(names or ("1001", "1002"))
        self.restarts = 0
        self.doing = "batch"

    @property
    def size(self):
        return len(self.names)

    def states(self):
        return [
            WorkerState(name, self.doing, batch=i, index=128, phase=1, rss=64 << 20)
            for i, name in enumerate(self.names)
        ]

    def replace(self, place, name):
        self.names[place] = name
        self.restarts += 1


class FakeCampaign:
    """What a screen looks at in a campaign; `elapsed` is its only clock."""

    def __init__(self, earlier=None, earlier_seconds=0.0):
        self.earlier = earlier or Totals()
        self.totals = Totals()
        self.merge(BatchResult(0, self.earlier.cases, self.earlier.agreed))
        self.earlier_seconds = earlier_seconds
        self.elapsed = 0.0
        self.shrinking = 0
        self.new = []
        self.pool = FakePool()
        self.on_said = None

    def merge(self, result):
        fresh = self.totals.merge(result)
        if hasattr(self, "new"):
            self.new.extend(fresh)

    def batch(self, number, agreed=100, skipped=None, findings=(), coverage=None):
        """Merge a batch."""
        skipped = skipped or {}
        result = BatchResult(number, agreed + sum(skipped.values()) + len(findings), agreed, dict(skipped))
        for (leaf, mode), cases in (coverage or {}).items():
            result.cells[leaf, mode, 0, "ok", ""] = Tally(cases)
        for finding in findings:
            result.add(finding)
        self.merge(result)


def a_finding(leaf="fb", mode="prot64", kind="gpr", code=b"\x11\xd8", batch=0, index=5, verdict=ALONE):
    """A finding of ADC, or of other code."""
    differences = (Difference("rax", kind, "0x1", "0x2"),)
    case = build_case(mode, code)
    return Finding(leaf, kind, verdict, batch, index, case, differences, sentence="emulator is alone")
