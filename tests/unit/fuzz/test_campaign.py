"""Campaigns: accounting, order, deduplication, workers that hang or die, directories."""

from __future__ import annotations

import json
import os
import time

import pytest

from emufuzz.case.model import Outcome
from emufuzz.fuzz.campaign import BATCH_SIZE, Campaign, Limits
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.store import FINDING_FORMAT, Store, StoreError, bucket_name, versions
from emufuzz.fuzz.workers import Setup
from emufuzz.subject.flat import FlatSubject

VERSIONS = {"subject": "emulator", "oracle": "twin"}


class Twin:
    """An oracle that is the subject again: it agrees with everything."""

    name = "twin"

    def __init__(self):
        self._subject = FlatSubject(events=False)

    def check(self, case):
        pass

    def run(self, batch):
        return self._subject.run(batch)

    def unchecked(self, case, outcome):  # noqa: ARG002 - the protocol has them
        return ()

    def fingerprint(self):
        return {"oracle": self.name}

    def close(self):
        pass


class Liar(Twin):
    """Wrong about RBX in every batch's cases of real mode."""

    def run(self, batch):
        outcomes = super().run(batch)
        for case, outcome in zip(batch, outcomes, strict=True):
            if case.mode == "real":
                gpr = list(outcome.gpr)
                gpr[3] ^= 1
                outcome.gpr = tuple(gpr)
        return outcomes


class Broken(Twin):
    """Raises, hangs or dies on one case of batch 1."""

    how = ""
    victim = "s1-b1-300"

    def run(self, batch):
        if any(case.id == self.victim for case in batch):
            if self.how == "raise":
                raise ValueError("victim")
            if self.how == "die":
                os._exit(3)
            time.sleep(60)
        return super().run(batch)


class Raises(Broken):
    how = "raise"


class Dies(Broken):
    how = "die"


class Hangs(Broken):
    how = "hang"


class CrashingSubject(FlatSubject):
    def _run(self, case):
        if case.id.endswith("-5"):
            raise ZeroDivisionError("seeded")
        return super()._run(case)


def subject():
    return FlatSubject(events=False)


def campaign(oracle, cases, store=None, **options):
    setup = Setup(1, Options(), subject, oracle)
    return Campaign(setup, Limits(cases), store, **options)


def balanced(totals):
    return totals.cases == totals.agreed + totals.skipped_cases + sum(totals.bucket_cases.values())


def test_agreement_is_accounted_for():
    totals = campaign(Twin, 3000).run()
    assert totals.cases == 3000
    assert not totals.findings
    assert balanced(totals)
    assert totals.covered() > 500


def test_findings_do_not_depend_on_the_number_of_workers(tmp_path):
    files = []
    for workers in (1, 2):
        store = Store(tmp_path / str(workers), VERSIONS)
        totals = campaign(Liar, BATCH_SIZE * 3, store, workers=workers).run()
        assert balanced(totals)
        assert totals.new
        files.append({path.name: path.read_bytes() for path in store.findings.iterdir()})
    assert files[0] == files[1]


def test_a_bucket_keeps_its_lowest_case():
    totals = campaign(Liar, BATCH_SIZE * 2).run()
    loop = CampaignLoop(subject(), Liar())
    for finding in list(totals.findings.values())[:5]:
        for number in range(finding.batch + 1):
            result = loop.run_batch(number, generate_batch(1, number, BATCH_SIZE))
            places = [(f.batch, f.index) for f in result.findings if f.bucket == finding.bucket]
            if places:
                assert places == [(finding.batch, finding.index)]
                break


@pytest.mark.parametrize(("oracle", "kind"), [(Raises, "crash"), (Dies, "crash"), (Hangs, "hang")])
def test_a_broken_oracle_is_a_finding_and_the_campaign_goes_on(oracle, kind):
    totals = campaign(oracle, BATCH_SIZE * 3, watchdog=2.0).run()
    assert totals.cases == BATCH_SIZE * 3
    assert balanced(totals)
    (finding,) = totals.findings.values()
    assert finding.kind == kind
    assert finding.case.id == Broken.victim


def test_a_crash_of_the_subject_has_its_traceback():
    loop = CampaignLoop(CrashingSubject(events=False), Twin())
    result = loop.run_batch(0, generate_batch(1, 0, 10))
    crashes = [finding for finding in result.findings if finding.kind == "crash"]
    assert [finding.case.id for finding in crashes] == ["s1-b0-5"]
    assert "ZeroDivisionError: seeded" in crashes[0].differences[0].subject


def test_interrupt_keeps_what_was_merged():
    running = campaign(Twin, None)

    def stop(state):
        if state.totals.cases:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        running.run(stop)
    assert running.totals.cases >= BATCH_SIZE
    assert balanced(running.totals)


def test_time_limit_ends_the_campaign():
    setup = Setup(1, Options(), subject, Twin)
    started = time.monotonic()
    totals = Campaign(setup, Limits(seconds=1.5)).run()
    assert time.monotonic() - started < 20
    assert balanced(totals)


def one_finding():
    result = CampaignLoop(subject(), Liar()).run_batch(0, generate_batch(1, 0, 400))
    return result.findings[0]


def test_a_finding_is_saved_whole_and_once(tmp_path):
    store = Store(tmp_path / "c", VERSIONS)
    finding = one_finding()
    assert store.save(finding)
    assert not store.save(finding)
    (path,) = store.findings.iterdir()
    saved = json.loads(path.read_bytes())
    assert saved["format"] == FINDING_FORMAT
    assert saved["case"]["id"] == finding.case.id
    assert set(saved["outcomes"]) == {"emulator", "twin"}
    assert saved["differences"][0]["field"] == "rbx"


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "precious").write_text("x")
    with pytest.raises(StoreError, match=r"not a campaign directory"):
        Store(tmp_path, VERSIONS)


def test_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="not a directory"):
        Store(tmp_path / "file", VERSIONS)


def test_a_campaign_directory_is_used_again(tmp_path):
    Store(tmp_path / "c", VERSIONS).begin({"seed": 1})
    store = Store(tmp_path / "c", VERSIONS)
    assert store.findings.is_dir()


def test_bucket_names_are_file_names():
    assert bucket_name(("f6/1", "real", "gpr")) == "f6_1-real-gpr"
    assert "/" not in bucket_name(("c4.mode64|mod3.(VEX)", "prot64", "rip"))
    assert bucket_name(("63.mode!64", "real", "rip")) != bucket_name(("63.mode64", "real", "rip"))


def test_versions_name_what_ran():
    assert versions(({"subject": "x"}, {"oracle": "y"})).keys() >= {"emufuzz", "python", "subject", "oracle"}


def test_outcome_of_a_refusal_is_skipped_by_its_reason():
    class Refuses(FlatSubject):
        def run(self, batch):
            return [
                Outcome(c.id, c.gpr, c.rip, c.rflags, c.system, rc="unhandleable", reason="because")
                for c in batch
            ]

    result = CampaignLoop(Refuses(), Twin()).run_batch(0, generate_batch(1, 0, 300))
    assert result.skipped == {"subject-unhandleable: because": 300}
    assert sum(result.coverage.values()) == 300
