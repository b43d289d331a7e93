"""Campaigns: accounting, order, deduplication, cases that workers hang or die over."""

from __future__ import annotations

import os
import time

import pytest
from support.misbehaving import Liar, Twin

from emufuzz.arch.leaves import LEAVES
from emufuzz.case.model import Outcome
from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.cells import CRASH, HANG, cpl_of
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.finding import Bucket
from emufuzz.fuzz.finding_json import versions
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.store import Store
from emufuzz.fuzz.tasks import Setup
from emufuzz.fuzz.workers.local import LocalPool
from emufuzz.subject.flat import FlatSubject

VERSIONS = {"subject": "emulator", "oracle": "twin"}


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


def campaign(oracle, cases, store=None, *, workers=1, watchdog=20.0):
    setup = Setup(1, Options(), subject, oracle)
    return Campaign(setup, Limits(cases), LocalPool(setup, workers, watchdog), store)


def new_store(directory):
    store = Store.create(directory, CampaignConfig(), None)
    store.begin("local:1", VERSIONS)
    return store


def exported(store):
    return {path.name: path.read_bytes() for path in store.findings.iterdir()}


def test_agreement_is_accounted_for():
    totals = campaign(Twin, 3000).run()
    assert totals.cases == 3000
    assert not totals.bucket_cases
    assert totals.balanced
    assert totals.covered() > 500


def test_findings_do_not_depend_on_the_number_of_workers(tmp_path):
    files, totals, cells = [], [], []
    for workers in (1, 2):
        store = new_store(tmp_path / str(workers))
        running = campaign(Liar, BATCH_SIZE * 3, store, workers=workers)
        assert running.run().balanced
        assert running.new
        files.append(exported(store))
        totals.append(store.totals())
        cells.append(store.cells())
        assert running.totals == totals[-1]
        store.close()
    assert files[0] == files[1]
    assert totals[0] == totals[1]
    assert cells[0] == cells[1]
    assert all((cells[0], totals[0].verdicts, totals[0].fields))


def test_a_bucket_keeps_its_lowest_case():
    running = campaign(Liar, BATCH_SIZE * 2)
    running.run()
    loop = CampaignLoop(subject(), Liar())
    for finding in running.new[:5]:
        for number in range(finding.batch + 1):
            result = loop.run_batch(number, generate_batch(1, number, BATCH_SIZE))
            places = [(f.batch, f.index) for f in result.findings if f.bucket == finding.bucket]
            if places:
                assert places == [(finding.batch, finding.index)]
                break


def test_a_known_bucket_is_counted_but_not_described():
    loop = CampaignLoop(subject(), Liar())
    cases = generate_batch(1, 0, 600)
    first = loop.run_batch(0, cases)
    loop.known = frozenset(first.bucket_cases)
    second = loop.run_batch(0, cases)
    assert second.bucket_cases == first.bucket_cases
    assert first.findings
    assert not second.findings


@pytest.mark.parametrize("parts", [(1000, 3000), (BATCH_SIZE, 3000), (2500, 2600, 3000)])
def test_a_campaign_in_parts_finds_what_it_finds_at_once(tmp_path, parts):
    whole = new_store(tmp_path / "whole")
    campaign(Liar, parts[-1], whole).run()
    store = new_store(tmp_path / "parts")
    for cases in parts:
        totals = campaign(Liar, cases, store).run()
    assert totals == whole.totals() == store.totals()
    assert exported(store) == exported(whole)
    store.close()
    whole.close()


@pytest.mark.parametrize(("oracle", "kind"), [(Raises, "crash"), (Dies, "crash"), (Hangs, "hang")])
def test_a_broken_oracle_is_a_finding_and_the_campaign_goes_on(oracle, kind, tmp_path):
    store = new_store(tmp_path / "out")
    running = campaign(oracle, BATCH_SIZE * 3, store, watchdog=2.0)
    totals = running.run()
    assert totals.cases == BATCH_SIZE * 3
    assert totals.balanced
    (finding,) = running.new
    assert finding.kind == kind
    assert finding.case.id == Broken.victim
    ((cell, count),) = (
        (cell, count) for cell, count in store.cells().items() if cell.outcome in (CRASH, HANG)
    )
    store.close()
    assert cell[1:] == (finding.case.mode, cpl_of(finding.case), kind, "")
    assert (count.cases, count.findings, count.batch, count.index) == (1, 1, 1, 300)


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
    assert running.totals.balanced


def test_time_limit_ends_the_campaign():
    setup = Setup(1, Options(), subject, Twin)
    started = time.monotonic()
    totals = Campaign(setup, Limits(seconds=1.5), LocalPool(setup, 1)).run()
    assert time.monotonic() - started < 20
    assert totals.balanced


def test_bucket_names_are_file_names():
    assert Bucket("f6/1", "real", "gpr", "alone").name == "f6_1-real-gpr"
    assert Bucket("f6/1", "real", "gpr", "split").name == "f6_1-real-gpr-split"
    assert "/" not in Bucket("../../x", "../y", "gpr", "alone").name
    assert len(Bucket("x" * 5000, "real", "gpr", "alone").name) < 100
    assert Bucket("é", "real", "gpr", "alone").name != Bucket("è", "real", "gpr", "alone").name


def test_bucket_names_of_all_leaves_differ():
    assert len({Bucket(leaf, "real", "gpr", "alone").name for leaf in LEAVES}) == len(LEAVES)


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
    assert sum(tally.cases for tally in result.cells.values()) == 300
    assert {outcome for _, _, _, outcome, _ in result.cells} == {"unhandleable"}
