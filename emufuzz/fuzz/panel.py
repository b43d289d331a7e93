"""Further oracles beside the first one, and what they all say of a case.

The first oracle is asked about every case. Of the others, cheap ones are asked whatever they take;
dear ones only where somebody objects, and a sample: every so many cases, by a case's contents, so
that the same cases are asked whatever worker has them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from zlib import crc32

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import AGREE, SKIPPED, agree, left_before
from emufuzz.oracle.mistaken import stand_ins
from emufuzz.oracle.quirks import explaining_quirk
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.verdict import Opinion, Ruling, combine, objection, opinions_of

#: One case in so many is shown to dear oracles even if all agree.
SAMPLE: Final = 64

Answers = list[tuple[Oracle, Outcome]]


class Panel:
    """The oracles of a campaign. `first` may be among the refusing ones for a case; then the rest decide."""

    def __init__(self, first: Oracle, others: Sequence[Oracle]) -> None:
        self.first = first
        self._rules = next((o for o in others if isinstance(o, RulesOracle)), None)
        judges = [o for o in others if not isinstance(o, RulesOracle)]
        self._cheap = [o for o in judges if o.capabilities.cost == "cheap"]
        self._dear = [o for o in judges if o.capabilities.cost != "cheap"]

    @property
    def names(self) -> tuple[str, ...]:
        """The oracles, first one first."""
        rules = () if self._rules is None else (self._rules.name,)
        return (self.first.name, *(o.name for o in (*self._cheap, *self._dear)), *rules)

    def rule(
        self, cases: Sequence[Case], subjects: Sequence[Outcome], answers: Sequence[Outcome | None]
    ) -> list[tuple[Ruling, Outcome | None]]:
        """The ruling on each case, with the outcome of the oracle that objects first.

        Args:
            cases: Cases that the subject took.
            subjects: Its outcomes.
            answers: What the first oracle says; None where it cannot take the case.
        """
        weighed = self.weigh(cases, subjects, answers)
        return [(ruling, objecting(ruling, answered)) for ruling, answered in weighed]

    def weigh(
        self, cases: Sequence[Case], subjects: Sequence[Outcome], answers: Sequence[Outcome | None]
    ) -> list[tuple[Ruling, Answers]]:
        """As `rule`, with what each oracle said that was asked; rules say nothing beyond the ruling."""
        known: list[Answers] = [[] if answer is None else [(self.first, answer)] for answer in answers]
        for oracle in self._cheap:
            _ask(oracle, cases, known, range(len(cases)))
        rulings = [self.ruling(*item) for item in zip(cases, subjects, known, strict=True)]
        doubtful = [
            i for i, ruling in enumerate(rulings) if ruling.kind != AGREE or not crc32(cases[i].code) % SAMPLE
        ]
        if self._dear and doubtful:
            for oracle in self._dear:
                _ask(oracle, cases, known, doubtful)
            for i in doubtful:
                rulings[i] = self.ruling(cases[i], subjects[i], known[i])
        return list(zip(rulings, known, strict=True))

    def ruling(self, case: Case, subject: Outcome, answers: Answers) -> Ruling:
        """The ruling on one case by the oracles that have answered, and by the rules."""
        left = left_before(case, subject)
        if left:
            return Ruling(SKIPPED, left)
        rules = self._of_rules(case, subject)
        views = () if rules is None else (rules.view,)
        broken = rules is not None and rules.verdict.kind != AGREE
        # Most cases agree at the first glance; only others are worth a closer look.
        if not broken and answers and all(agree(subject, outcome) for _, outcome in answers):
            return Ruling(AGREE, views=(*((oracle.name, "") for oracle, _ in answers), *views))
        opinions = opinions_of(case, subject, answers)
        views = (*(opinion.view for opinion in opinions), *views)
        if rules is not None and broken:
            opinions.append(rules)
        return combine(subject, opinions)._replace(views=views)

    def judge(self, case: Case, subject: Outcome, answer: Outcome | None) -> tuple[Ruling, list[Opinion]]:
        """The ruling on one case by all oracles that take it, dear ones too, and what each says.

        `answer` is what the first oracle says, None where it cannot take the case. Nobody is asked where KVM
        left before the instruction.
        """
        left = left_before(case, subject)
        if left:
            return Ruling(SKIPPED, left), []
        known: list[Answers] = [[] if answer is None else [(self.first, answer)]]
        for oracle in (*self._cheap, *self._dear):
            _ask(oracle, [case], known, [0])
        opinions = opinions_of(case, subject, known[0])
        rules = self._of_rules(case, subject)
        if rules is not None and rules.verdict.kind != AGREE:
            opinions.append(rules)
        return combine(subject, opinions), opinions

    def _of_rules(self, case: Case, subject: Outcome) -> Opinion | None:
        """What the rules say; None if they do not judge the case. That they are kept vouches for nothing."""
        if self._rules is None:
            return None
        try:
            self._rules.check(case)
        except UnsupportedCaseError:
            return None
        differences = self._rules.differences(case, subject)
        if not differences:
            return objection(self._rules.name, subject, ())
        demanded = self._rules.demanded(case, subject)
        excuse = explaining_quirk(case, subject, demanded, differences)
        if excuse is None:
            excuse = next(
                (name for name, other, ours in stand_ins(case, subject) if self._keeps(other, ours)), ""
            )
        return objection(self._rules.name, subject, differences, excuse)

    def _keeps(self, case: Case, subject: Outcome) -> bool:
        """An outcome breaks no rule in a case but where a quirk explains it."""
        if self._rules is None:
            raise ValueError("there are no rules")
        differences = self._rules.differences(case, subject)
        demanded = self._rules.demanded(case, subject)
        return not differences or explaining_quirk(case, subject, demanded, differences) is not None

    def close(self) -> None:
        """Release what the further oracles hold; the first one is the caller's."""
        for oracle in (*self._cheap, *self._dear):
            oracle.close()


def _ask(oracle: Oracle, cases: Sequence[Case], known: list[Answers], places: Sequence[int]) -> None:
    """Add an oracle's answers to the cases at `places` that it takes."""
    taken = []
    for i in places:
        try:
            oracle.check(cases[i])
        except UnsupportedCaseError:
            continue
        taken.append(i)
    for i, outcome in zip(taken, oracle.run([cases[i] for i in taken]) if taken else (), strict=True):
        known[i].append((oracle, outcome))


def objecting(ruling: Ruling, answers: Answers) -> Outcome | None:
    """The outcome of the first oracle that objects; the first one's where rules alone do."""
    for oracle, outcome in answers:
        if oracle.name in ruling.against:
            return outcome
    return answers[0][1] if answers else None
