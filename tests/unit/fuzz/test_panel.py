"""Several oracles in a campaign."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.model import Outcome
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.panel import SAMPLE, Panel
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED
from emufuzz.oracle.rules import RulesOracle
from emufuzz.subject.flat import FlatSubject

CASES = [
    build_case("prot64", bytes((0x48, 0x01, 0xD8)), rax=value, rbx=2, id=f"{value}") for value in range(8)
]
OUTCOMES = FlatSubject(events=False).run(CASES)


class Fake:
    """Answers as the port does, off by one in RAX where `wrong` says so; refuses what `takes` does not."""

    def __init__(self, name, *, cost="cheap", wrong=lambda case: False, takes=lambda case: True, gaps=()):
        self.name, self.wrong, self.takes, self.gaps = name, wrong, takes, gaps
        self.capabilities = Capabilities(cost=cost)
        self.ledger = ()
        self.seen = []
        self.closed = False

    def check(self, case):
        if not self.takes(case):
            raise UnsupportedCaseError("not mine")

    def run(self, batch):
        self.seen += [case.id for case in batch]
        outcomes = FlatSubject(events=False).run(batch)
        for case, outcome in zip(batch, outcomes, strict=True):
            if self.wrong(case):
                outcome.gpr = (outcome.gpr[0] + 1, *outcome.gpr[1:])
        return outcomes

    def unchecked(self, case, outcome):
        return self.gaps

    def close(self):
        self.closed = True


def _rule(first, *others):
    panel = Panel(first, others)
    rulings = panel.rule(CASES, OUTCOMES, first.run(CASES))
    return [ruling for ruling, _ in rulings]


def test_all_agree():
    assert {ruling.kind for ruling in _rule(Fake("a"), Fake("b"))} == {AGREE}


def test_another_oracle_may_object_alone():
    rulings = _rule(Fake("a"), Fake("b", wrong=lambda case: case.id == "3"))
    assert [ruling.kind for ruling in rulings] == [FINDING if i == 3 else AGREE for i in range(8)]
    assert (rulings[3].against, rulings[3].beside) == (("b",), ("a",))


def test_a_cheap_oracle_sees_what_it_takes():
    other = Fake("b", takes=lambda case: int(case.id) % 2)
    _rule(Fake("a"), other)
    assert other.seen == ["1", "3", "5", "7"]


def test_a_dear_oracle_sees_doubtful_cases_and_a_sample():
    codes = {bytes((0x48, 0x01, 0xC0 | i)) for i in range(0x40)}
    cases = [msgspec.structs.replace(CASES[0], code=code, id=code.hex()) for code in sorted(codes)] * 8
    outcomes = FlatSubject(events=False).run(cases)
    first, dear = Fake("a", wrong=lambda case: case.id == "4801c3"), Fake("b", cost="dear")
    Panel(first, [dear]).rule(cases, outcomes, first.run(cases))
    assert "4801c3" in dear.seen
    assert len(set(dear.seen)) <= 1 + len(codes) * 6 // SAMPLE


def test_the_sample_does_not_depend_on_the_batch():
    first, dear = Fake("a"), Fake("b", cost="dear")
    panel = Panel(first, [dear])
    for part in (CASES[:3], CASES[3:]):
        outcomes = FlatSubject(events=False).run(part)
        panel.rule(part, outcomes, first.run(part))
    whole = Fake("b", cost="dear")
    Panel(first, [whole]).rule(CASES, OUTCOMES, first.run(CASES))
    assert dear.seen == whole.seen


def test_where_the_first_oracle_is_silent_the_others_decide():
    panel = Panel(Fake("a"), [Fake("b", wrong=lambda case: True)])
    (ruling, answer), *_ = panel.rule(CASES[:1], OUTCOMES[:1], [None])
    assert (ruling.kind, ruling.against) == (FINDING, ("b",))
    assert answer.gpr[0] == OUTCOMES[0].gpr[0] + 1


def test_nobody_takes_a_case():
    (ruling, answer), *_ = Panel(Fake("a"), [Fake("b", takes=lambda case: False)]).rule(
        CASES[:1], OUTCOMES[:1], [None]
    )
    assert (ruling.kind, answer) == (SKIPPED, None)
    assert ruling.reason.startswith("nobody-vouches")


@pytest.fixture
def broken():
    """CLI at CPL 3 without IOPL, which the subject carries out."""
    case = build_case("prot64", b"\xfa", cpl=3)
    outcome = Outcome(case.id, case.gpr, case.rip + 1, case.rflags & ~0x200, case.system, length=1, leaf="fa")
    return case, outcome


def test_rules_object_to_what_the_first_oracle_does_not_see(broken):
    case, outcome = broken

    class Silent(Fake):
        def run(self, batch):
            return [outcome]

    panel = Panel(Silent("a"), [RulesOracle()])
    ((ruling, _),) = panel.rule([case], [outcome], [outcome])
    assert (ruling.kind, ruling.against) == (FINDING, ("rules",))
    assert ruling.differences[0].field == "exception"
    assert panel.names == ("a", "rules")


def test_the_loop_accounts_for_every_case():
    first = Fake("a", wrong=lambda case: case.id == "5", gaps=(("rax", "a-gap"),))
    second = Fake("b", takes=lambda case: case.id != "5", wrong=lambda case: case.id == "6")
    result = CampaignLoop(FlatSubject(events=False), first, others=[second]).run_batch(0, CASES)
    assert (result.cases, result.agreed, result.skipped) == (8, 6, {"a-gap": 1})
    (finding,) = result.findings
    assert finding.case.id == "6"
    assert finding.sentence == "emulator is alone against b"


def test_closing_releases_the_others():
    other = Fake("b")
    Panel(Fake("a"), [other]).close()
    assert other.closed
