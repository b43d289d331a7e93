"""Many cases both ways: how many agree, which rules explain the rest, and what nothing explains.

WRMSR and HLT, which KVM looks at before any handler, run a third time without that fastpath.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final, NamedTuple

from emufuzz.case.model import Case
from emufuzz.fuzz.handlers.generate import generate
from emufuzz.fuzz.handlers.observe import Observed, differing, run_emulator, run_handler
from emufuzz.fuzz.handlers.pair import Pair
from emufuzz.fuzz.handlers.rules import RULES, explain
from emufuzz.fuzz.handlers.rules_instructions import filter_passed_over
from emufuzz.kvm import exit_reasons as er
from emufuzz.subject.kvm.instruction_exits import NoExitError

_FASTPATH: Final = frozenset({er.EXIT_REASON_MSR_WRITE, er.EXIT_REASON_HLT})


class Verdict(NamedTuple):
    """What became of one case.

    Attributes:
        fastpath: KVM's fastpath may have had it, and its handler was run as well.
        no_exit: Why hardware does not exit, empty if it does.
        equal: Handler and emulator agree in every field.
        rules: Names of the rules that explain why they do not.
        unexplained: Fields in which the emulator is not as the rules foretell; those with `fastpath.` before
            them are of a fastpath that is not as its handler.
    """

    no_exit: str = ""
    equal: bool = False
    rules: tuple[str, ...] = ()
    unexplained: tuple[str, ...] = ()
    fastpath: bool = False


class Unexplained(NamedTuple):
    """A finding: the case, without prefix, the kind of its instruction, and what differs."""

    kind: str
    case: Case
    verdict: Verdict


class Totals:
    """Counts of a run; `skipped` are cases without exit, by reason."""

    def __init__(self) -> None:
        self.cases = 0
        self.equal = 0
        self.explained = 0
        self.fastpath = 0
        self.kinds: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.rules: Counter[str] = Counter()
        self.unexplained: list[Unexplained] = []

    @property
    def compared(self) -> int:
        """Cases in which hardware exits."""
        return self.equal + self.explained + len(self.unexplained)

    def add(self, kind: str, case: Case, verdict: Verdict) -> None:
        """Count one case."""
        self.cases += 1
        if verdict.no_exit:
            self.skipped[verdict.no_exit] += 1
            return
        self.kinds[kind] += 1
        self.fastpath += verdict.fastpath
        self.rules.update(verdict.rules)
        if verdict.unexplained:
            self.unexplained.append(Unexplained(kind, case, verdict))
        elif verdict.equal:
            self.equal += 1
        else:
            self.explained += 1

    def lines(self) -> list[str]:
        """The counts for people: totals, kinds of instructions, rules, reasons of no exit."""
        skipped = sum(self.skipped.values())
        return [
            f"cases        {self.cases:9}",
            f"  no exit    {skipped:9}",
            f"  compared   {self.compared:9}",
            f"    equal    {self.equal:9}",
            f"    explained{self.explained:9}",
            f"    unexplained{len(self.unexplained):7}",
            f"  with fastpath{self.fastpath:7}",
            "",
            "compared, by instruction:",
            *_table(self.kinds),
            "",
            "explained by:",
            *(f"  {self.rules[rule.name]:9}  {rule.name:20} {rule.why}" for rule in RULES),
            "",
            "no exit, as:",
            *_table(self.skipped),
        ]


def _table(counts: Counter[str]) -> list[str]:
    return [f"  {count:9}  {name}" for name, count in counts.most_common()]


def judge(case: Case) -> Verdict:
    """Run one case both ways and compare."""
    try:
        handler = run_handler(case)
    except NoExitError as error:
        return Verdict(no_exit=str(error))
    return judge_runs(case, handler, run_emulator(case))


def judge_runs(case: Case, handler: Observed, emulator: Observed) -> Verdict:
    """Compare what the handler did with what the emulator did.

    A difference that a rule foretells and that is not there counts as unexplained, too.
    """
    pair = Pair(case, handler, emulator)
    unexplained = explain(pair)
    unexplained += [f"fastpath.{name}" for name in _fastpath_differences(pair)]
    equal = not differing(handler.fields, emulator.fields)
    return Verdict("", equal, tuple(pair.rules), tuple(unexplained), pair.reason in _FASTPATH)


def _fastpath_differences(pair: Pair) -> list[str]:
    """Fields in which the handler, called without fastpath, does something else."""
    if pair.reason not in _FASTPATH or filter_passed_over(pair):
        return []
    return differing(pair.handler.fields, pair.rerun(fastpath=False))


def run(seed: int, numbers: Iterable[int]) -> Totals:
    """Judge the cases of a seed with these numbers."""
    totals = Totals()
    for number in numbers:
        kind, case = generate(seed, number)
        totals.add(kind, case, judge(case))
    return totals
