"""What each filter says of a finding, given what the present code makes of it."""

from __future__ import annotations

import pytest
from support.stores import made_up, merge, new_store

from emufuzz.fuzz.finding import FAILED
from emufuzz.fuzz.shrink import Shrunk
from emufuzz.fuzz.store.marker import StoreMarker
from emufuzz.fuzz.store.records import BUG, DUPLICATE, EXPLAINED, KNOWN, NEW
from emufuzz.fuzz.triage import FILTERS, Judgement, UnknownFilterError, chosen_filters, marks_of, triage
from emufuzz.fuzz.triage.judgement import failed
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, Difference, Verdict
from emufuzz.oracle.verdict import Opinion, Ruling

STANDS = Judgement(Ruling(FINDING))
SMALL = b"\x11\xc0"


def skipped(reason):
    return Judgement(Ruling(SKIPPED, reason))


class Says:
    """A judge that says what a test has it say, by the code of a case."""

    def __init__(self, default=STANDS, **by_code):
        self.default = default
        self.by_code = {bytes.fromhex(code.removeprefix("x")): value for code, value in by_code.items()}
        self.asked = []

    def judge(self, case):
        self.asked.append(case.code)
        return self.by_code.get(case.code, self.default)

    def close(self):
        pass


@pytest.fixture
def campaign(tmp_path):
    """Makes a campaign of findings, and gives its marker: `campaign(finding, ..., shrunk={..})`."""
    opened = []

    def make(*findings, shrunk=()):
        store = new_store(tmp_path / f"c{len(opened)}")
        merge(store, 0, findings)
        for finding in shrunk:
            store.save_shrunk(finding.bucket, Shrunk(finding))
        store.close()
        opened.append(StoreMarker(store.directory))
        return opened[-1]

    yield make
    for marker in opened:
        marker.close()


def states(marker):
    return {record.bucket.name: (record.state, record.reason) for record in marker.records()}


ONE = made_up()
NAME = ONE.bucket.name


@pytest.mark.parametrize(("judgement", "state", "reason"), [
    (STANDS,                                NEW,       ""),
    (skipped("kvm-quirk-06-x"),             EXPLAINED, "known-quirk: kvm-quirk-06-x"),
    (skipped("kvm-quirk-06-x+unicorn-y"),   EXPLAINED, "known-quirk: kvm-quirk-06-x+unicorn-y"),
    (skipped("unicorn-y"),                  EXPLAINED, "known-gap: unicorn-y"),
    (failed("signal 9"),                    NEW,       ""),
])  # fmt: skip
def test_what_the_present_code_explains(campaign, judgement, state, reason):
    marker = campaign(ONE)
    summary = triage(marker, tuple(FILTERS), Says(judgement))
    assert states(marker) == {NAME: (state, reason)}
    assert summary.judged == 1
    assert summary.new == ([NAME] if state == NEW else [])


def test_what_agrees_now_is_gone(campaign):
    marker = campaign(ONE)
    triage(marker, tuple(FILTERS), Says(Judgement(Ruling(AGREE))))
    state, reason = states(marker)[NAME]
    assert state == EXPLAINED
    assert reason.startswith("gone: ")


def test_what_explains_the_shrunk_form_alone_explains_nothing(campaign):
    marker = campaign(ONE, shrunk=[made_up(code=SMALL)])
    judge = Says(STANDS, x11c0=skipped("unicorn-y"))
    triage(marker, tuple(FILTERS), judge)
    assert states(marker) == {NAME: (NEW, "")}
    assert set(judge.asked) == {SMALL, ONE.case.code}


def test_duplicates_are_of_the_first_that_stands(campaign):
    other = made_up(mode="compat32", index=3)
    third = made_up(mode="prot16", index=6)
    different = made_up(mode="compat16", index=7, code=b"\x11\xc8")
    marker = campaign(ONE, other, third, different)
    triage(marker, tuple(FILTERS), Says())
    found = states(marker)
    assert found[NAME] == (NEW, "")
    assert found[other.bucket.name] == (DUPLICATE, f"duplicate: of {NAME}")
    assert found[third.bucket.name] == (DUPLICATE, f"duplicate: of {NAME}")
    assert found[different.bucket.name] == (NEW, "")


def test_nothing_is_a_duplicate_of_what_is_explained(campaign):
    other = made_up(mode="compat32", index=3, code=b"\x11\xc0")
    marker = campaign(ONE, other)
    triage(marker, tuple(FILTERS), Says(STANDS, x11d8=skipped("unicorn-y")))
    assert states(marker)[other.bucket.name] == (NEW, "")


def test_marks_of_people_stand_and_count_for_duplicates(campaign):
    other = made_up(mode="compat32", index=3)
    marker = campaign(ONE, other)
    marker.mark([NAME], BUG, "see the list")
    judge = Says(skipped("unicorn-y"))
    summary = triage(marker, ("duplicate",), judge)
    assert summary.kept == 1
    assert judge.asked == []
    assert states(marker)[other.bucket.name] == (DUPLICATE, f"duplicate: of {NAME}")


def test_marks_of_other_campaigns(campaign):
    elsewhere = campaign(ONE)
    elsewhere.mark([NAME], KNOWN, "since 2019")
    here = campaign(ONE)
    marks = marks_of([elsewhere.directory])
    triage(here, tuple(FILTERS), Says(), marks)
    state, reason = states(here)[NAME]
    assert state == KNOWN
    assert reason.startswith("marked: ")
    assert "since 2019" in reason


def test_crashes_are_run_again_on_demand_only(campaign):
    marker = campaign(made_up(kind="crash", verdict=FAILED))
    judge = Says(Judgement(Ruling(AGREE)))
    assert triage(marker, tuple(FILTERS), judge).new
    assert judge.asked == []
    assert not triage(marker, tuple(FILTERS), judge, again=True).new


def test_again_takes_back_what_does_not_hold_any_more(campaign):
    marker = campaign(ONE)
    triage(marker, tuple(FILTERS), Says(skipped("unicorn-y")))
    unchanged = triage(marker, tuple(FILTERS), Says())
    assert (unchanged.judged, unchanged.new) == (0, [])
    assert triage(marker, tuple(FILTERS), Says(), again=True).new == [NAME]
    assert states(marker) == {NAME: (NEW, "")}


def test_filters_are_composed_by_name(campaign):
    marker = campaign(ONE)
    triage(marker, chosen_filters("duplicate, known-quirk"), Says(skipped("unicorn-y")))
    assert states(marker)[NAME][0] == NEW
    triage(marker, chosen_filters("known-gap"), Says(skipped("unicorn-y")))
    assert states(marker)[NAME][0] == EXPLAINED


@pytest.mark.parametrize("text", ["known-quirk,none-such", " , "])
def test_filters_that_do_not_exist(text):
    with pytest.raises(UnknownFilterError, match="known are known-quirk, known-gap"):
        chosen_filters(text)


# --- vendors --------------------------------------------------------------------------------------

APPROXIMATED = [("rflags", "unicorn-approximation")]
FLAGS = (Difference("rflags", "rflags", "0x2 []", "0x42 [ZF]"),)


def opinion(name, kind, differences=(), unchecked=()):
    return Opinion(name, None, Verdict(kind, "", tuple(differences)), tuple(unchecked))


@pytest.mark.parametrize(("opinions", "reason"), [
    ([opinion("native", FINDING, FLAGS), opinion("bochs", AGREE, (), [("rflags", "bochs-vendor")])],
     "bochs does the same; vendors differ: bochs-vendor"),
    ([opinion("native", FINDING, FLAGS), opinion("unicorn", AGREE, (), APPROXIMATED)],
     "only native objects, to what is undefined: unicorn-approximation"),
    ([opinion("native", FINDING, FLAGS), opinion("bochs", AGREE, (), [("rax", "bochs-vendor")])], ""),
    ([opinion("native", FINDING, FLAGS), opinion("bochs", FINDING, FLAGS, [("rflags", "bochs-vendor")])], ""),
    ([opinion("rules", FINDING, FLAGS), opinion("unicorn", AGREE, (), APPROXIMATED)], ""),
    ([opinion("native", FINDING, FLAGS)], ""),
])  # fmt: skip
def test_where_vendors_differ(campaign, opinions, reason):
    marker = campaign(ONE)
    triage(marker, ("vendor",), Says(Judgement(Ruling(FINDING), tuple(opinions))))
    expected = (EXPLAINED, f"vendor: {reason}") if reason else (NEW, "")
    assert states(marker) == {NAME: expected}
