"""Campaigns over exit paths: accounting, results per path, the same whatever the number of workers."""

from __future__ import annotations

import pytest

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.cli.main import main
from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.finding import place_of
from emufuzz.fuzz.finding_json import finding_from_obj
from emufuzz.fuzz.kvm.generate import PathOptions, generator_of
from emufuzz.fuzz.loop import CampaignLoop, skip_reason
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.shrink import Limits as ShrinkLimits
from emufuzz.fuzz.store import Store, StoreView
from emufuzz.fuzz.tasks import Setup
from emufuzz.fuzz.workers.local import LocalPool
from emufuzz.subject.kvm import KvmSubject

VERSIONS = {"subject": "kvm", "oracle": "twin"}
OPTIONS = PathOptions(paths=("ept-violation", "exit", "io-string"))


class Twin:
    """An oracle that is the subject again, judges nothing of path `exit`, and lies about real mode."""

    ledger = ()

    name = "twin"

    def __init__(self):
        self._subject = KvmSubject()

    def check(self, case):
        if case.path == "exit":
            raise UnsupportedCaseError("path: not at 0x1234")

    def run(self, batch):
        outcomes = self._subject.run(batch)
        for case, outcome in zip(batch, outcomes, strict=True):
            assert case.path != "exit"
            if case.mode == "real":
                gpr = list(outcome.gpr)
                gpr[3] ^= 1
                outcome.gpr = tuple(gpr)
        return outcomes

    def unchecked(self, case, outcome):
        return ()

    def fingerprint(self):
        return {"oracle": self.name, "twin": "1"}

    def close(self):
        pass


def campaign(directory, workers):
    setup = Setup(4, OPTIONS, KvmSubject, Twin)
    store = Store.create(directory, CampaignConfig(), None)
    store.begin(f"local:{workers}", VERSIONS)
    limits = Limits(BATCH_SIZE + 512)
    totals = Campaign(setup, limits, LocalPool(setup, workers), store, ShrinkLimits(200)).run()
    store.close()
    return totals


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same campaign with one worker and with two: (totals, directory) each."""
    made = []
    for workers in (1, 2):
        directory = tmp_path_factory.mktemp(f"workers{workers}")
        made.append((campaign(directory, workers), directory))
    return made


def test_every_case_is_accounted_for(runs):
    totals, _ = runs[0]
    assert totals.cases == BATCH_SIZE + 512
    assert totals.balanced


def test_reasons_have_no_numbers_of_single_cases(runs):
    totals, _ = runs[0]
    assert totals.skipped["twin: path: not at .."] > 100
    assert not any("0x" in reason for reason in totals.skipped)


def test_results_are_counted_per_path(runs):
    totals, _ = runs[0]
    results = totals.summary()["results"]
    assert set(results) == set(OPTIONS.paths)
    assert results["ept-violation"]["MMIO_READ"] > 100
    assert results["io-string"]["PIO_IN"] > 100


def test_nothing_depends_on_the_number_of_workers(runs):
    (one, first), (two, second) = runs
    assert one.summary() == two.summary()
    names = [sorted(path.name for path in d.joinpath("findings").iterdir()) for d in (first, second)]
    assert names[0] == names[1]
    for name in names[0]:
        assert first.joinpath("findings", name).read_bytes() == second.joinpath("findings", name).read_bytes()


def test_findings_are_kept_per_path_and_without_memory_that_does_not_matter(runs):
    totals, directory = runs[0]
    records = StoreView(directory).records()
    assert {record.bucket for record in records} == set(totals.bucket_cases)
    findings = [finding_from_obj(record.document) for record in records]
    for record, finding in zip(records, findings, strict=True):
        assert record.bucket.place == place_of(finding.case) == f"{finding.case.path}-real"
        assert record.bucket.kind == "gpr"
    assert any(not finding.case.mem.entries for finding in findings)


def test_a_subject_without_a_reason_is_counted_by_its_results():
    (case,) = generator_of(1, 0, PathOptions(paths=("exit",))).cases(1)
    (outcome,) = KvmSubject().run([case])
    outcome.rc, outcome.reason, outcome.extra = "io_needed", "", {"livelock": True}
    assert skip_reason(outcome) == "subject-io_needed: LIVELOCK"


def test_a_crash_of_the_subject_is_a_finding():
    class Crashing(KvmSubject):
        def _run(self, case):
            raise ZeroDivisionError("seeded")

    cases = generator_of(1, 0, OPTIONS).cases(20)
    result = CampaignLoop(Crashing(), Twin()).run_batch(0, cases)
    assert {bucket.kind for bucket in result.bucket_cases} == {"crash"}
    assert {name for _, name in result.results} == {"CRASH"}
    assert sum(result.bucket_cases.values()) == 20


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--subject", "xen"], "--subject: unknown subject 'xen', known are emulator, kvm"),
        (["--subject", "kvm", "--paths", "ud,ept"], "--paths: unknown path 'ept', known are ud, fep"),
        (["--subject", "kvm", "--paths", ","], "--paths: names no path"),
        (["--paths", "ud"], "--paths: only --subject kvm has exit paths"),
        (
            ["--subject", "kvm", "--paths", "rmode-inject", "--modes", "prot64"],
            "--paths: none of them exists",
        ),
    ],
)
def test_bad_options_are_one_line(arguments, says, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["emufuzz", "fuzz", "--out", str(tmp_path / "out"), *arguments])
    with pytest.raises(SystemExit, match=r"^2$"):
        main()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"emufuzz: {says}")


def test_the_command_runs_a_path(monkeypatch, capsys, tmp_path):
    out = tmp_path / "out"
    arguments = ["--subject", "kvm", "--paths", "ept-misconfig", "--cases", "100", "--out", str(out)]
    monkeypatch.setattr("sys.argv", ["emufuzz", "fuzz", *arguments])
    with pytest.raises(SystemExit, match=r"^[01]$"):
        main()
    shown = capsys.readouterr().out
    assert "ept-misconfig" in shown
    assert "MMIO_READ" in shown
    view = StoreView(out)
    assert view.config().paths == ("ept-misconfig",)
    assert view.totals().cases == 100
    assert {path for path, _ in view.totals().results} == {"ept-misconfig"}
