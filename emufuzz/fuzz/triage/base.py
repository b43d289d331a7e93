"""What filters see, and what they say."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias

from emufuzz.fuzz.finding import FAILED, Finding
from emufuzz.fuzz.store.records import BUG, KNOWN, NEW
from emufuzz.fuzz.triage.cause import Cause, cause_of
from emufuzz.fuzz.triage.judgement import Judge, Judgement
from emufuzz.fuzz.triage.loaded import Loaded

#: States of findings that stand: what others may be duplicates of.
STANDING = frozenset((NEW, KNOWN, BUG))


class Decision(NamedTuple):
    """What a filter makes of a finding: its state, and why in a few words."""

    state: str
    reason: str


class Candidate:
    """A finding that filters look at.

    Attributes:
        name: Its bucket's name.
        finding: The finding, shrunk if it was.
        state: Its state; while filters run, that of the findings before it is decided already.
    """

    def __init__(self, loaded: Loaded, judge: Judge, *, replay_failed: bool = True) -> None:
        """Take a finding.

        Args:
            loaded: The finding.
            judge: Who runs it again, if a filter asks for that.
            replay_failed: Also crashes and hangs are run again, each of which may take long.
        """
        self.name = loaded.name
        self.finding = loaded.finding
        self.state = loaded.record.state
        self._loaded = loaded
        self._judge = judge
        self._replays = replay_failed or loaded.finding.verdict != FAILED

    @cached_property
    def judgement(self) -> Judgement | None:
        """What the present code makes of the finding; None if it is not run again."""
        return self._judge.judge(self.finding.case) if self._replays else None

    @cached_property
    def first_judgement(self) -> Judgement | None:
        """The same of the finding before it was shrunk."""
        if self._loaded.record.shrunk is None:
            return self.judgement
        return self._judge.judge(self.found.case) if self._replays else None

    @property
    def settled(self) -> Judgement | None:
        """What is said of the finding if it is none any more, in neither of its forms; else None.

        What explains the shrunk form alone may leave something else in the case that was found.
        """
        now = self.judgement
        if now is None or now.stands:
            return None
        first = self.first_judgement
        return None if first is None or first.stands else now

    @cached_property
    def cause(self) -> Cause:
        """What tells its cause."""
        return cause_of(self.finding)

    @cached_property
    def found(self) -> Finding:
        """The finding before it was shrunk."""
        return self._loaded.as_found()[1]


class Context(NamedTuple):
    """What there is beside the finding.

    Attributes:
        earlier: Findings with lower numbers, in their order, with the states they have now.
        marks: Name of a bucket -> what other campaigns say that know it.
    """

    earlier: Sequence[Candidate]
    marks: Mapping[str, str]


#: What a filter says of a finding: None if it has nothing against it.
Filter: TypeAlias = Callable[[Candidate, Context], Decision | None]
