"""Who vouches for what: of the fields that instructions change, those for which no oracle stands.

Cases are generated as in a campaign, and every oracle that takes a case is asked. A field of
`emufuzz.fuzz.changed` is vouched for by an oracle that took the case and none of whose gaps covers it; by
rules that object to its wrong values (emufuzz.fuzz.probing), which are asked where no engine vouches. Dear
oracles are asked last, where a field has nobody yet, and as in any campaign: where somebody
objects, and about a sample.
"""

from __future__ import annotations

import multiprocessing as mp
import re
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Case, Outcome
from emufuzz.fuzz.changed import Field, changed_fields
from emufuzz.fuzz.engines import SUBJECTS, make_oracle
from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.judging import at_stop, gap_of
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.kvm.results import NO_EXIT, result_of
from emufuzz.fuzz.panel import Answers, Panel
from emufuzz.fuzz.probing import Probe
from emufuzz.fuzz.vouched import Vouched
from emufuzz.oracle.base import Oracle
from emufuzz.oracle.compare import AGREE, FINDING, LEFT, refusal
from emufuzz.oracle.exits.run import UNDEFINED, NoExitError, UndefinedError
from emufuzz.oracle.gaps import covers
from emufuzz.oracle.native_view import judge_case
from emufuzz.oracle.registry import open_oracle
from emufuzz.oracle.rules import RulesOracle
from emufuzz.oracle.verdict import NOBODY, Ruling

#: Cases per batch.
BATCH: Final = 1024
_CHUNK: Final = 128
#: Path of a case on flat memory, which enters no KVM.
FLAT: Final = "flat"
_DONE: Final = ("continue", "propagate_fault")
_QUIRK: Final = "kvm-"
_NUMBER: Final = re.compile(r"0x[0-9a-f]+")

#: Classes whose cases have no fields: nothing changed that anybody could stand for.
_UNTESTED: Final = frozenset(("left", "no-exit", "undefined"))


class Task(NamedTuple):
    """A numbered batch of cases: `subject` is one of SUBJECTS."""

    subject: str
    seed: int
    number: int
    size: int
    options: Options


def classify(ruling: Ruling, subject: Outcome) -> tuple[str, str]:
    """(one of CLASSES, the reason) of a case."""
    if ruling.kind == AGREE:
        return "agreed", ""
    if ruling.kind == FINDING:
        return "finding", ", ".join(ruling.against) or "subject"
    if refusal(subject):
        return "refused", _NUMBER.sub("..", ruling.reason)
    kind = "gap"
    if ruling.reason.startswith(LEFT):
        return "left", ruling.reason
    if ruling.reason.startswith(_QUIRK):
        kind = "quirk"
    elif ruling.reason.startswith(NOBODY):
        kind = "nobody"
    return kind, _NUMBER.sub("..", ruling.reason)


class Judged(NamedTuple):
    """A case with what everybody made of it: `gaps` of the oracles that took it, `by` names who vouches."""

    case: Case
    subject: Outcome
    ruling: Ruling
    answers: Answers
    gaps: dict[str, tuple[tuple[str, str], ...]]
    by: dict[Field, list[str]]


class Counting:
    """The oracles, and what is counted with them."""

    def __init__(self, first: Oracle, others: Sequence[Oracle]) -> None:
        self.first = first
        self._panel = Panel(first, others)
        self._rules = next((o for o in others if isinstance(o, RulesOracle)), None)
        self._engines = [first, *(o for o in others if not isinstance(o, RulesOracle))]
        self._dear = [o for o in self._engines if o.capabilities.cost != "cheap"]

    def count(self, cases: Sequence[Case], outcomes: Sequence[Outcome]) -> Vouched:
        """Ask everybody about the cases and what a subject made of them."""
        total = Vouched()
        live = [i for i, outcome in enumerate(outcomes) if not self._add_refused(total, outcome)]
        taken, subjects = [cases[i] for i in live], [outcomes[i] for i in live]
        judged = self._judge(taken, subjects)
        self._ask_dear(judged)
        for each in judged:
            kind, reason = classify(each.ruling, each.subject)
            if kind == "nobody":
                kind, reason = self._ruled_out(each.case) or (kind, reason)
            total.classes[kind] += 1
            if reason:
                total.reasons[kind, reason] += 1
            if kind not in _UNTESTED:
                self._add_fields(total, each)
        return total

    def _ruled_out(self, case: Case) -> tuple[str, str] | None:
        """(class, reason) if an oracle says that hardware would not come there, or that all is undefined."""
        for oracle in self._engines:
            try:
                oracle.check(case)
            except (NoExitError, UndefinedError) as error:
                kind = "no-exit" if isinstance(error, NoExitError) else "undefined"
                return kind, _NUMBER.sub("..", str(error))
            except UnsupportedCaseError:
                continue
        return None

    def _judge(self, cases: Sequence[Case], subjects: Sequence[Outcome]) -> list[Judged]:
        weighed = self._panel.weigh(cases, subjects, self._answers(cases))
        return [
            self._judged(case, subject, ruling, answers)
            for case, subject, (ruling, answers) in zip(cases, subjects, weighed, strict=True)
        ]

    def _judged(self, case: Case, subject: Outcome, ruling: Ruling, answers: Answers) -> Judged:
        """Which fields changed, and who vouches for each."""
        asked = [(oracle, at_stop(case, subject, outcome, oracle)) for oracle, outcome in answers]
        asked = [(oracle, outcome) for oracle, outcome in asked if not (outcome.crash or outcome.hang)]
        outcomes = [outcome for _, outcome in asked]
        gaps = {oracle.name: oracle.unchecked(case, outcome) for oracle, outcome in asked}
        by: dict[Field, list[str]] = {}
        probe = None
        for each in changed_fields(judge_case(case), subject, outcomes):
            by[each] = [name for name, unchecked in gaps.items() if not gap_of(unchecked, each)]
            if not by[each] and self._rules is not None:
                probe = probe or Probe(self._rules, case, subject, outcomes)
                by[each] = [self._rules.name] if probe.vouches(each) else []
        return Judged(case, subject, ruling, answers, gaps, by)

    def _ask_dear(self, judged: list[Judged]) -> None:
        """Show dear oracles the cases with a field that nobody else vouches for."""
        places = [i for i, each in enumerate(judged) if not all(each.by.values())]
        for oracle in self._dear:
            taken = [
                i for i in places
                if oracle.name not in judged[i].gaps and not _refusal(oracle, judged[i].case)
            ]  # fmt: skip
            outcomes = oracle.run([judged[i].case for i in taken]) if taken else ()
            for i, outcome in zip(taken, outcomes, strict=True):
                case, subject = judged[i].case, judged[i].subject
                answers = [*judged[i].answers, (oracle, outcome)]
                ruling = self._panel.ruling(case, subject, answers)
                judged[i] = self._judged(case, subject, ruling, answers)

    @staticmethod
    def _add_refused(total: Vouched, outcome: Outcome) -> bool:
        """Count a case that the subject did not do: nothing changed, so that there are no fields."""
        if outcome.crash or outcome.hang or outcome.rc in _DONE:
            return False
        kind = "no-exit" if NO_EXIT in result_of(outcome) else "refused"
        total.classes[kind] += 1
        why = outcome.reason or ", ".join(sorted(result_of(outcome)))
        total.reasons[kind, _NUMBER.sub("..", f"{outcome.rc}: {why}")] += 1
        return True

    def _answers(self, cases: Sequence[Case]) -> list[Outcome | None]:
        """What the first oracle says; None where it cannot take the case."""
        answers: list[Outcome | None] = [None] * len(cases)
        taken = [i for i, case in enumerate(cases) if not _refusal(self.first, case)]
        for i, answer in zip(taken, self.first.run([cases[i] for i in taken]), strict=True):
            answers[i] = answer
        return answers

    def _add_fields(self, total: Vouched, judged: Judged) -> None:
        total.asked.update(judged.gaps.keys())
        place, leaf = judged.case.path or FLAT, judged.subject.leaf or "undecoded"
        for each, names in judged.by.items():
            if not names and UNDEFINED in (gap_of(unchecked, each) for unchecked in judged.gaps.values()):
                total.undefined[kind_of(each)] += 1
                continue
            key = place, leaf, kind_of(each)
            total.fields[key] += 1
            total.by.update(names)
            if len(names) == 1:
                total.alone[names[0]] += 1
            if not names:
                total.unvouched[key] += 1
                total.causes[(*key, self._cause(judged, each))] += 1

    def _cause(self, judged: Judged, each: Field) -> str:
        """The gaps of those that took the case, or why the first oracle did not."""
        if judged.gaps:
            return " + ".join(gap_of(unchecked, each) for unchecked in judged.gaps.values())
        return f"{self.first.name} refuses: {_NUMBER.sub('..', _refusal(self.first, judged.case))}"

    def close(self) -> None:
        """Release the oracles."""
        self._panel.close()
        self.first.close()


def kind_of(each: Field) -> str:
    """`gpr` for all general registers, else the field's name."""
    return "gpr" if covers("gpr", each.name) else each.name


def _refusal(oracle: Oracle, case: Case) -> str:
    """Why an oracle does not take a case; empty if it does."""
    try:
        oracle.check(case)
    except UnsupportedCaseError as error:
        return str(error)
    return ""


def tasks_of(subjects: Sequence[str], seed: int, cases: int, options: dict[str, Options]) -> list[Task]:
    """The batches of a run: the same number of cases for each subject, in order."""
    tasks = []
    for place, subject in enumerate(subjects):
        left = cases // len(subjects) + (place < cases % len(subjects))
        tasks += [
            Task(subject, seed, number, min(BATCH, left - number * BATCH), options[subject])
            for number in range(-(-left // BATCH))
        ]
    return tasks


def count_tasks(tasks: Sequence[Task], oracles: Sequence[str], workers: int) -> Iterator[Vouched]:
    """What each batch counts, in order; what a worker counts does not depend on which one it is.

    Args:
        tasks: From `tasks_of`.
        oracles: Names of oracles beside the first one.
        workers: Processes; 1 = this one.
    """
    if workers == 1:
        counting = _open(oracles)
        try:
            yield from (run_task(counting, task) for task in tasks)
        finally:
            counting.close()
        return
    with mp.get_context("spawn").Pool(workers, _start, (tuple(oracles),)) as pool:
        yield from pool.imap(_work, tasks)


def run_task(counting: Counting, task: Task) -> Vouched:
    """Generate and count one batch."""
    total, subject = Vouched(), SUBJECTS[task.subject]()
    cases = generator_of(task.seed, task.number, task.options).cases(task.size)
    for start in range(0, len(cases), _CHUNK):
        part = cases[start : start + _CHUNK]
        total.merge(counting.count(part, subject.run(part)))
    return total


def _open(oracles: Sequence[str]) -> Counting:
    return Counting(make_oracle(), [open_oracle(name) for name in oracles])


#: A worker's own oracles, opened at its start.
_worker: dict[str, Counting] = {}


def _start(oracles: Sequence[str]) -> None:
    _worker["counting"] = _open(oracles)


def _work(task: Task) -> Vouched:
    return run_task(_worker["counting"], task)
