"""Findings for tests of shrinking: a case is one as long as a test's condition holds."""

from __future__ import annotations

from emufuzz.fuzz.finding import ALONE, Finding
from emufuzz.fuzz.shrink import Limits
from emufuzz.fuzz.shrink.probe import Probe
from emufuzz.oracle.compare import Difference
from emufuzz.subject.flat import FlatSubject

RAX = (Difference("rax", "gpr", "0x1", "0x2"),)


class Finder:
    """Says that a case is a finding if a condition holds; remembers what it was asked."""

    def __init__(self, holds, leaf="fb"):
        self.holds = holds
        self.leaf = leaf
        self.asked = []
        self._subject = FlatSubject(events=False)

    def __call__(self, case):
        self.asked.append(case)
        if not self.holds(case):
            return None
        return self.finding(case)

    def finding(self, case, batch=3, index=7):
        outcome = self._subject.run([case])[0] if case.path is None else None
        return Finding(self.leaf, "gpr", ALONE, batch, index, case, RAX, subject=outcome)


def probe_of(case, holds, calls=5000):
    """A probe of a case that is a finding as long as the condition holds."""
    finder = Finder(holds)
    assert holds(case)
    return Probe(finder.finding(case), finder, Limits(calls, 60.0))
