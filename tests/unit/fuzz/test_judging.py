"""What oracles have judged: cases by leaf and reason, and fields of a sample."""

from __future__ import annotations

from collections import Counter

import pytest
from msgspec.structs import replace

from emufuzz.case.build import build_case
from emufuzz.fuzz.accounting import BatchResult, Totals
from emufuzz.fuzz.judging import AGREED, OBJECTS, SAMPLE, VOUCHES, count_view
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.oracle.base import Capabilities
from emufuzz.oracle.rules import RulesOracle
from emufuzz.subject.flat import FlatSubject

ADD = bytes((0x48, 0x01, 0xD8))
CASES = [
    build_case("prot64", ADD if number % 3 else b"\x90", rax=number, rbx=3, id=f"{number}")
    for number in range(SAMPLE + 1)
]


class Fake:
    """Answers as the port does, with RAX off by one in every case of ADD whose RAX is `wrong`."""

    ledger = ()
    capabilities = Capabilities(cost="cheap")

    def __init__(self, name, wrong=-1, gaps=()):
        self.name, self.wrong, self.gaps = name, wrong, gaps

    def check(self, case):
        pass

    def run(self, batch):
        outcomes = FlatSubject(events=False).run(batch)
        for case, outcome in zip(batch, outcomes, strict=True):
            if case.gpr[0] == self.wrong:
                outcome.gpr = (outcome.gpr[0] + 1, *outcome.gpr[1:])
        return outcomes

    def unchecked(self, case, outcome):
        return self.gaps


def counted(*oracles, cases=CASES):
    first, *others = oracles
    return CampaignLoop(FlatSubject(events=False), first, others=others).run_batch(0, cases)


def test_every_answer_is_counted_by_leaf():
    result = counted(Fake("a", wrong=4))
    adds = sum(1 for case in CASES if case.code[0] == 0x48)
    assert result.verdicts == {
        ("a", "01", AGREED): adds - 1,
        ("a", "01", OBJECTS): 1,
        ("a", "90", AGREED): len(CASES) - adds,
    }
    assert result.agreed == len(CASES) - 1


@pytest.mark.parametrize("others", [(), (Fake("b"),)])
def test_one_field_in_so_many_cases_is_weighed(others):
    result = counted(Fake("a", gaps=(("rflags", "a-flags"),)), *others)
    places = [place for place in range(len(CASES)) if place % SAMPLE == 0]
    assert places == [0, SAMPLE]
    of_a = {key[1:]: count for key, count in result.fields.items() if key[0] == "a"}
    # NOP changes RIP; ADD changes RIP, RAX and the flags.
    assert of_a == {("90", VOUCHES): 1, ("01", VOUCHES): 2, ("01", "a-flags"): 1}
    if others:
        of_b = {key[1:]: count for key, count in result.fields.items() if key[0] == "b"}
        assert of_b == {("90", VOUCHES): 1, ("01", VOUCHES): 3}


def test_several_oracles_are_counted_one_by_one():
    result = counted(Fake("a"), Fake("b", wrong=4, gaps=(("rax", "b-rax"),)), RulesOracle())
    totals = Counter()
    for (oracle, _, _), count in result.verdicts.items():
        totals[oracle] += count
    assert totals == {"a": len(CASES), "b": len(CASES), "rules": len(CASES)}
    assert ("a", "01", OBJECTS) not in result.verdicts
    assert sum(n for (oracle, _, reason), n in result.verdicts.items() if oracle == "b" and reason) == 1


def test_an_oracle_that_vouches_for_nothing_has_not_agreed():
    result = counted(
        Fake("a", wrong=4, gaps=(("all", "a-all"),)), Fake("b", wrong=4, gaps=(("all", "b-all"),))
    )
    assert result.verdicts["a", "01", "a-all"] == 1


def test_numbers_of_single_cases_are_left_out():
    verdicts = {}
    count_view(verdicts, "a", "90", "at 0x1234")
    count_view(verdicts, "a", "90", "at 0x5678")
    assert verdicts == {("a", "90", "at .."): 2}


def test_what_the_subject_refuses_no_oracle_has_judged():
    far = replace(CASES[0], code=b"\xf4")
    result = counted(Fake("a"), cases=[far])
    assert sum(result.verdicts.values()) == result.agreed + sum(result.bucket_cases.values())


def test_counts_of_batches_add_up():
    totals = Totals()
    for number in (0, 1):
        totals.merge(BatchResult(number, verdicts={("a", "90", ""): 2}, fields={("a", "90", "g"): 3}))
    assert totals.verdicts == {("a", "90", ""): 4}
    assert totals.fields == {("a", "90", "g"): 6}
