"""The pool of processes that run libFuzzer, with processes that do as they are told."""

from __future__ import annotations

from multiprocessing.connection import Pipe

import pytest

from emufuzz.case.codec import encode_case
from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.libfuzzer import pool as pools
from emufuzz.fuzz.libfuzzer.mark import LONGEST, Mark
from emufuzz.fuzz.libfuzzer.process import Death
from emufuzz.fuzz.loop import PHASE_ORACLE
from emufuzz.fuzz.tasks import BatchTask, Done
from emufuzz.fuzz.triage.judgement import Judgement, failed
from emufuzz.fuzz.workers.local import WorkerUnavailableError
from emufuzz.oracle.verdict import Ruling

SETUP = CampaignConfig().setup()
CASE = encode_case(generate_batch(1, 0, 1)[0])


def account(number, cases):
    return BatchResult(number, cases, agreed=cases)


class FakeProcess:
    """Says what is in its list, one at a time."""

    def __init__(self, news):
        self.connection, self.other = Pipe()
        self.other.send("something to read")
        self.news = list(news)
        self.ready = False
        self.instrumented = {}
        self.tasks = []
        self.killed = False
        self.cuts = 0

    def cut(self):
        self.cuts += 1

    def run(self, task):
        self.tasks.append(task)

    def hear(self, *, busy):
        if not self.news or (not busy and self.ready):
            return None
        said = self.news.pop(0)
        self.ready = self.ready or (not isinstance(said, Death) and said[0] == "ready")
        return said

    def last_words(self):
        return "its last words"

    def kill(self):
        self.killed = True

    close = kill


class FakeJudge:
    def __init__(self, how):
        self.how = how
        self.asked = []

    def judge(self, case):
        self.asked.append(case)
        return failed(self.how) if self.how else Judgement(Ruling("agree"))

    def close(self):
        """Nothing is open."""


@pytest.fixture
def make(tmp_path, monkeypatch):
    def made(*lives, judged=""):
        monkeypatch.setattr(pools, "seed_corpus", lambda directory, setup: 0)
        processes = [FakeProcess(news) for news in lives]
        waiting = iter(processes)
        pool = pools.FuzzerPool(SETUP, 1, tmp_path, make=lambda seed: next(waiting))
        pool._judge = FakeJudge(judged)
        pool.start()
        return pool, processes

    return made


READY = ("ready", {"emufuzz.emulator": 5})


def run(pool, task, polls=8):
    said = []
    for _ in range(polls):
        if task is not None and pool.idle():
            pool.submit(0, task)
            task = None
        said += pool.poll(0)
    return said


def test_parts_of_a_batch_become_one_result(make):
    news = [READY, ("part", account(0, 30)), ("part", account(0, 20)), ("done", account(0, 14))]
    pool, _ = make(news)
    [done] = run(pool, BatchTask(0, 0, 64))
    assert isinstance(done, Done)
    assert (done.value.cases, done.value.agreed) == (64, 64)


def test_a_batch_goes_on_in_a_new_process(make):
    death = Death("crash", "killed by signal 9", 0, None)
    pool, (_, second) = make([READY, ("part", account(0, 30)), death], [READY, ("done", account(0, 34))])
    [done] = run(pool, BatchTask(0, 0, 64))
    assert [(task.first, task.stop) for task in second.tasks] == [(30, 64)]
    assert (done.value.cases, done.value.bucket_cases, pool.restarts) == (64, {}, 1)


def test_a_case_that_ends_two_processes_is_a_finding(make):
    death = Death("crash", "killed by signal 6", PHASE_ORACLE, CASE)
    pool, (_, second) = make(
        [READY, ("part", account(0, 30)), death],
        [READY, ("done", account(0, 33))],
        judged="signal 6",
    )
    [done] = run(pool, BatchTask(0, 0, 64))
    [finding] = done.value.findings
    assert (finding.kind, finding.verdict, finding.index) == ("crash", "failed", 30)
    assert finding.differences[0].oracle == "killed by signal 6"
    assert [(task.first, task.stop) for task in second.tasks] == [(31, 64)]
    assert done.value.cases == 64 == done.value.agreed + sum(done.value.bucket_cases.values())


def test_a_task_ends_early_when_time_is_up(make):
    pool, (process,) = make([READY, ("part", account(0, 30)), ("done", account(0, 4))])
    pool.seconds = 0.0
    [done] = run(pool, BatchTask(0, 10, 64))
    assert process.cuts == 1
    assert (done.task.first, done.task.stop, done.value.cases) == (10, 44, 34)


def test_a_hang_is_called_one(make):
    death = Death("hang", "no progress for 20 s", 1, CASE)
    pool, _ = make([READY, death], [READY, ("done", account(0, 0))], judged="no answer for 20 s")
    [done] = run(pool, BatchTask(0, 5, 6))
    assert [(f.kind, f.index) for f in done.value.findings] == [("hang", 5)]
    assert done.value.cases == 1


def test_a_death_that_does_not_happen_again_blames_nobody(make):
    death = Death("crash", "killed by signal 9", 1, CASE)
    pool, _ = make([READY, death], [READY, ("done", account(0, 64))])
    [done] = run(pool, BatchTask(0, 0, 64))
    assert done.value.findings == []
    assert len(pool._judge.asked) == 1


def test_processes_that_only_die_end_the_campaign(make):
    death = Death("crash", "exit code 1", 0, None)
    pool, _ = make(*[[death]] * 6)
    with pytest.raises(WorkerUnavailableError, match=r"ended 5 times: exit code 1: its last words"):
        run(pool, None)


def test_what_cannot_work_here_is_said(make):
    pool, _ = make([("unavailable", "atheris: emufuzz.kvm.x86: none of 30 functions is instrumented")])
    with pytest.raises(WorkerUnavailableError, match=r"emufuzz\.kvm\.x86"):
        run(pool, None)


def test_a_mark_is_seen_by_the_other_side():
    mark = Mark.create()
    other = Mark(mark.descriptor)
    mark.case(b"abc")
    mark.progress(2, 77)
    assert other.read() == (2, 77, 1)
    assert other.read_case() == b"abc"
    mark.case(bytes(LONGEST))
    assert len(other.read_case()) == LONGEST
    mark.idle()
    assert other.read_case() is None
    mark.close()
