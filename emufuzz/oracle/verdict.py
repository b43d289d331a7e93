"""What several oracles together say of a case, and who stands against whom.

Each oracle's own view comes from `emufuzz.oracle.compare.judge`. Here they are put together field by
field: a difference that one oracle sees is weighed by whether the others vouch for that field and
have what the subject has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import (
    AGREE,
    FINDING,
    SKIPPED,
    Difference,
    Verdict,
    failure,
    judge,
    refusal,
)
from emufuzz.oracle.gaps import covers

NOBODY: Final = "nobody-vouches"
_QUIRK: Final = "kvm-"


class Opinion(NamedTuple):
    """One oracle's view of one case: its outcome, its verdict, what it does not vouch for."""

    oracle: str
    outcome: Outcome
    verdict: Verdict
    unchecked: tuple[tuple[str, str], ...] = ()

    def vouches(self, field: str) -> bool:
        """Whether no gap takes a field of this case away from the oracle."""
        return not any(covers(gap_field, field) for gap_field, _ in self.unchecked)

    @property
    def view(self) -> tuple[str, str]:
        """As in Ruling.views; agreement of an oracle that vouches for nothing is none."""
        if self.verdict.kind == AGREE:
            return self.oracle, next((gap for field, gap in self.unchecked if field == "all"), "")
        return self.oracle, FINDING if self.verdict.kind == FINDING else self.verdict.reason


class Ruling(NamedTuple):
    """The verdict of all.

    Attributes:
        kind: AGREE, FINDING or SKIPPED.
        reason: Why a case was skipped: a quirk, gaps, a refusal, or NOBODY.
        differences: What the first oracle that objects sees.
        against: Oracles that disagree with the subject on a field that they vouch for.
        beside: Oracles that vouch for all these fields and have what the subject has.
        views: (oracle, why it did not compare to the end, FINDING if it objects, else empty) of each that
            was asked; as a panel fills it in.
    """

    kind: str
    reason: str = ""
    differences: tuple[Difference, ...] = ()
    against: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    views: tuple[tuple[str, str], ...] = ()

    @property
    def split(self) -> bool:
        """The oracles disagree among themselves."""
        return bool(self.against and self.beside)

    def sentence(self, subject: str) -> str:
        """Who disagrees with whom, in words."""
        if self.kind == AGREE:
            return "all agree"
        if self.kind == SKIPPED:
            return f"not judged: {self.reason}"
        if not self.against:
            return f"{subject} failed by itself"
        against = _list(self.against)
        if self.split:
            verb = "agrees" if len(self.beside) == 1 else "agree"
            return (
                f"the oracles are split: {against} against {subject}, with which {_list(self.beside)} {verb}"
            )
        return f"{subject} is alone against {against}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def opinions_of(case: Case, subject: Outcome, answers: Sequence[tuple[Oracle, Outcome]]) -> list[Opinion]:
    """Every oracle's view of a case. Gaps are looked up where they can matter.

    That is for oracles that do not simply agree, and for all of them if one objects.
    """
    opinions = _alike([_opinion(case, subject, outcome, oracle) for oracle, outcome in answers])
    if any(opinion.verdict.kind != AGREE for opinion in opinions):
        opinions = [
            opinion._replace(unchecked=outcome.unchecked or oracle.unchecked(case, outcome))
            for opinion, (oracle, outcome) in zip(opinions, answers, strict=True)
        ]
    return opinions


def _alike(opinions: list[Opinion]) -> list[Opinion]:
    """A quirk that explains a difference from one oracle explains the same one from any other.

    Not every oracle can run the case that stands in for what KVM takes an instruction for.
    """
    explained = {o.verdict.differences: o.verdict for o in opinions if o.verdict.reason.startswith(_QUIRK)}
    if not explained:
        return opinions
    return [
        o._replace(verdict=explained.get(o.verdict.differences, o.verdict))
        if o.verdict.kind == FINDING
        else o
        for o in opinions
    ]


def _opinion(case: Case, subject: Outcome, outcome: Outcome, oracle: Oracle) -> Opinion:
    if outcome.crash or outcome.hang:
        how = "hang" if outcome.hang else "crash"
        verdict = Verdict(SKIPPED, f"{oracle.name}-{how}", ())
        return Opinion(oracle.name, outcome, verdict, (("all", f"{oracle.name}-{how}"),))
    return Opinion(oracle.name, outcome, judge(case, subject, outcome, oracle), outcome.unchecked)


def objection(name: str, subject: Outcome, differences: tuple[Difference, ...], excuse: str = "") -> Opinion:
    """The opinion of rules that a subject's outcome breaks; `excuse` is the quirk that explains it."""
    kind = (SKIPPED if excuse else FINDING) if differences else AGREE
    return Opinion(name, subject, Verdict(kind, excuse, differences))


def combine(subject: Outcome, opinions: Sequence[Opinion]) -> Ruling:
    """One ruling from all opinions on a case.

    A finding needs one oracle that objects to a field for which it vouches, beyond every known quirk and
    gap. Else the case agrees if any oracle does, and is skipped under the first reason if none does.
    """
    if subject.crash or subject.hang:
        return Ruling(FINDING, "", (failure(subject),))
    refused = refusal(subject)
    if refused:
        return Ruling(SKIPPED, refused)
    if not opinions:
        return Ruling(SKIPPED, f"{NOBODY}: no oracle takes the case")
    against = [opinion for opinion in opinions if opinion.verdict.kind == FINDING]
    if against:
        return _finding(against, opinions)
    quirks = [o.verdict for o in opinions if o.verdict.kind == SKIPPED]
    if not quirks:
        return _agreed(opinions)
    named = next((verdict for verdict in quirks if verdict.reason.startswith(_QUIRK)), None)
    if named is not None:
        return Ruling(SKIPPED, named.reason, named.differences)
    if any(o.verdict.kind == AGREE and _vouches_for_all(o, quirks[0]) for o in opinions):
        return Ruling(AGREE)
    return Ruling(SKIPPED, quirks[0].reason, quirks[0].differences)


def _agreed(opinions: Sequence[Opinion]) -> Ruling:
    """Agreement of oracles none of which vouches for anything is none."""
    silent = [gap for o in opinions for field, gap in o.unchecked if field == "all"]
    if len(silent) >= len(opinions) and all(any(f == "all" for f, _ in o.unchecked) for o in opinions):
        return Ruling(SKIPPED, f"{NOBODY}: {silent[0]}")
    return Ruling(AGREE)


def _vouches_for_all(opinion: Opinion, verdict: Verdict) -> bool:
    return all(opinion.vouches(difference.field) for difference in verdict.differences)


def _finding(against: Sequence[Opinion], opinions: Sequence[Opinion]) -> Ruling:
    fields = {d.field for opinion in against for d in opinion.verdict.differences}
    beside = [
        opinion.oracle
        for opinion in opinions
        if opinion.verdict.kind != FINDING
        and all(opinion.vouches(field) for field in fields)
        and not fields & {d.field for d in opinion.verdict.differences}
    ]
    names = tuple(opinion.oracle for opinion in against)
    return Ruling(FINDING, "", against[0].verdict.differences, names, tuple(beside))
