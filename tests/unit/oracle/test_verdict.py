"""Several oracles on one case: who stands against whom."""

from __future__ import annotations

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Outcome
from emufuzz.oracle import verdict
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, Difference, Verdict
from emufuzz.oracle.verdict import NOBODY, Ruling, combine, objection, opinions_of

CASE = build_case("prot64", b"\x48\x01\xd8", rax=1, rbx=2)


def _outcome(rax=3, **changes):
    gpr = (rax, *CASE.gpr[1:])
    fields = {"length": 3, "leaf": "01", **changes}
    return Outcome(CASE.id, gpr, CASE.rip + 3, CASE.rflags, CASE.system, **fields)


class FakeOracle:
    """Answers with what it is told, and has the gaps it is told."""

    def __init__(self, name, *gaps):
        self.name = name
        self.gaps = gaps
        self.asked = 0
        self.ledger = ()

    def unchecked(self, case, outcome):
        self.asked += 1
        return self.gaps


def _rule(subject, *answers):
    pairs = [(FakeOracle(name, *gaps), outcome) for name, outcome, *gaps in answers]
    return combine(subject, opinions_of(CASE, subject, pairs))


def test_all_agree():
    ruling = _rule(_outcome(), ("a", _outcome()), ("b", _outcome()))
    assert ruling == Ruling(AGREE)
    assert ruling.sentence("port") == "all agree"


def test_gaps_are_not_looked_up_while_all_agree():
    oracle = FakeOracle("a")
    opinions_of(CASE, _outcome(), [(oracle, _outcome())])
    assert oracle.asked == 0


def test_the_subject_is_alone():
    ruling = _rule(_outcome(9), ("a", _outcome()), ("b", _outcome()))
    assert (ruling.kind, ruling.against, ruling.beside) == (FINDING, ("a", "b"), ())
    assert [d.field for d in ruling.differences] == ["rax"]
    assert ruling.sentence("port") == "port is alone against a and b"


def test_oracles_are_split():
    ruling = _rule(_outcome(9), ("a", _outcome()), ("b", _outcome(9)), ("c", _outcome(9)))
    assert (ruling.against, ruling.beside, ruling.split) == (("a",), ("b", "c"), True)
    expected = "the oracles are split: a against port, with which b and c agree"
    assert ruling.sentence("port") == expected


def test_who_does_not_vouch_does_not_stand_beside():
    ruling = _rule(_outcome(9), ("a", _outcome()), ("b", _outcome(9), ("rax", "b-gap")))
    assert (ruling.against, ruling.beside) == (("a",), ())


@pytest.mark.parametrize("field", ["all", "gpr", "rax"])
def test_a_gap_of_the_only_objector_leaves_agreement_with_those_who_vouch(field):
    subject = _outcome(9)
    assert _rule(subject, ("a", _outcome(), (field, "a-gap"))).reason == "a-gap"
    assert _rule(subject, ("a", _outcome(), (field, "a-gap")), ("b", _outcome(9))) == Ruling(AGREE)
    both = _rule(subject, ("a", _outcome(), (field, "a-gap")), ("b", _outcome(9), ("all", "b-gap")))
    assert (both.kind, both.reason) == (SKIPPED, "a-gap")


def test_a_gap_about_something_else_excuses_nothing():
    assert _rule(_outcome(9), ("a", _outcome(), ("rbx", "a-gap"))).kind == FINDING


def test_nobody_vouches():
    assert _rule(_outcome()).reason.startswith(NOBODY)
    silent = _outcome()
    silent.unchecked = (("all", "a-gap"),)
    ruling = _rule(_outcome(), ("a", silent))
    assert (ruling.kind, ruling.reason) == (SKIPPED, f"{NOBODY}: a-gap")


def test_a_subject_that_fails_needs_no_oracle():
    ruling = _rule(_outcome(crash="KeyError: 7"), ("a", _outcome()))
    assert (ruling.kind, ruling.against) == (FINDING, ())
    assert ruling.differences == (Difference("subject", "crash", "KeyError: 7", ""),)
    assert ruling.sentence("port") == "port failed by itself"


def test_a_refused_case_is_skipped_under_the_subjects_reason():
    subject = _outcome(rc="unhandleable", reason="not implemented by KVM")
    assert _rule(subject, ("a", _outcome())).reason == "subject-unhandleable: not implemented by KVM"


@pytest.mark.parametrize("failure", [{"crash": "died"}, {"hang": True}])
def test_an_oracle_that_fails_says_nothing(failure):
    dead = _outcome(**failure)
    assert _rule(_outcome(), ("a", dead), ("b", _outcome())) == Ruling(AGREE)
    assert _rule(_outcome(), ("a", dead)).reason.startswith("a-")


def test_a_known_quirk_is_named_even_if_others_agree():
    quirk = objection("rules", _outcome(), (Difference("rax", "gpr", "3", "4"),), "kvm-quirk-99")
    (agreed,) = opinions_of(CASE, _outcome(), [(FakeOracle("a"), _outcome())])
    assert combine(_outcome(), [agreed, quirk]).reason == "kvm-quirk-99"


def test_broken_rules_count_like_an_oracle():
    subject = _outcome()
    broken = objection("rules", subject, (Difference("exception", "fault-missing", "none", "#GP(0)"),))
    (agreed,) = opinions_of(CASE, subject, [(FakeOracle("a"), subject)])
    ruling = combine(subject, [agreed, broken])
    assert (ruling.kind, ruling.against, ruling.beside) == (FINDING, ("rules",), ("a",))
    assert combine(subject, [agreed, objection("rules", subject, ())]) == Ruling(AGREE)


def test_case_is_not_changed_by_judging():
    before = msgspec.structs.asdict(CASE)
    _rule(_outcome(9), ("a", _outcome()))
    assert msgspec.structs.asdict(CASE) == before


def test_a_quirk_explains_all_who_have_the_same_otherwise(monkeypatch):
    same, other = Difference("rax", "gpr", "0x9", "0x3"), Difference("rax", "gpr", "0x9", "0x4")
    verdicts = {
        "a": Verdict(SKIPPED, "kvm-quirk-x", (same,)),
        "b": Verdict(FINDING, "", (same,)),
        "c": Verdict(FINDING, "", (other,)),
    }
    monkeypatch.setattr(verdict, "judge", lambda _case, _subject, _outcome, oracle: verdicts[oracle.name])
    ruling = _rule(_outcome(9), ("b", _outcome()), ("a", _outcome()))
    assert (ruling.kind, ruling.reason) == (SKIPPED, "kvm-quirk-x")
    ruling = _rule(_outcome(9), ("a", _outcome()), ("b", _outcome()), ("c", _outcome(4)))
    assert (ruling.kind, ruling.against) == (FINDING, ("c",))


def test_a_gap_of_one_oracle_explains_nothing_of_another(monkeypatch):
    same = Difference("rax", "gpr", "0x9", "0x3")
    verdicts = {"a": Verdict(SKIPPED, "a-gap", (same,)), "b": Verdict(FINDING, "", (same,))}
    monkeypatch.setattr(verdict, "judge", lambda _case, _subject, _outcome, oracle: verdicts[oracle.name])
    assert _rule(_outcome(9), ("a", _outcome()), ("b", _outcome())).against == ("b",)
