"""Worker processes of this machine: each way in which one can end, and what becomes of its task."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import misbehaving
from support.misbehaving import (
    MARK,
    AnswersTheSecondTime,
    CannotWorkHere,
    Dies,
    Eats,
    Hangs,
    NeverStarts,
    Raises,
    StartsSlowly,
    Twin,
    setup_with,
)
from support.pools import alive, answer, children, until, until_idle

from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.loop import CHUNK, PHASE_ORACLE
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.tasks import BatchTask, Done, Failure, ShrinkTask
from emufuzz.fuzz.workers.local import LocalPool, Worker, WorkerUnavailableError

TASK = BatchTask(0, 0, 500)
#: Where the victim's chunk begins.
CHUNK_START = 300 // CHUNK * CHUNK


@pytest.fixture
def pool_with():
    """Makes started pools, and ends them."""
    pools = []

    def make(oracle, size=1, **options):
        pools.append(LocalPool(setup_with(oracle), size, **options))
        pools[-1].start()
        return pools[-1]

    yield make
    for pool in pools:
        pool.kill()


def pids(pool):
    return [int(state.name) for state in pool.states()]


def busy(pool):
    """Give the first worker its task, and wait until it has come to the victim."""
    until_idle(pool)
    pool.submit(0, TASK)
    until(lambda: pool.states()[0].index == CHUNK_START and pool.states()[0].phase == PHASE_ORACLE)


def works(pool):
    """Whether every worker does a batch."""
    until_idle(pool)
    results = []
    for worker in range(pool.size):
        pool.submit(worker, BatchTask(1, 0, 100))
        results.append(answer(pool))
    return all(isinstance(said, Done) and said.value.cases == 100 for said in results)


def test_a_worker_that_is_killed_while_it_is_idle_is_replaced(pool_with):
    pool = pool_with(Twin)
    until_idle(pool)
    (pid,) = pids(pool)
    os.kill(pid, signal.SIGKILL)
    until(lambda: pool.poll(0.05) == [] and pids(pool) != [pid])
    assert pool.restarts == 1
    assert works(pool)


def test_a_worker_that_is_killed_while_it_works_says_which_case_it_had(pool_with):
    pool = pool_with(Hangs)
    busy(pool)
    os.kill(pids(pool)[0], signal.SIGKILL)
    assert answer(pool) == Failure(TASK, "crash", PHASE_ORACLE, CHUNK_START, "killed by signal 9")
    assert pool.restarts == 1
    assert works(pool)


def test_a_worker_that_is_killed_while_it_starts_is_replaced(pool_with):
    pool = pool_with(StartsSlowly, 2)
    first = pids(pool)
    os.kill(first[0], signal.SIGKILL)
    assert until_idle(pool) == []
    assert pids(pool)[0] != first[0]
    assert pids(pool)[1] == first[1]
    assert pool.restarts == 1
    assert works(pool)


def test_a_worker_that_makes_no_progress_is_killed(pool_with):
    pool = pool_with(Hangs, watchdog=8.0)
    busy(pool)
    (pid,) = pids(pool)
    assert answer(pool) == Failure(TASK, "hang", PHASE_ORACLE, CHUNK_START, "no progress for 8 s")
    assert not alive(pid)
    assert works(pool)


def test_a_worker_that_takes_too_much_memory_is_killed(pool_with):
    pool = pool_with(Eats, memory=400 << 20)
    busy(pool)
    (pid,) = pids(pool)
    assert answer(pool) == Failure(TASK, "memory", PHASE_ORACLE, CHUNK_START, "more than 400 MiB of memory")
    assert not alive(pid)
    assert works(pool)


def test_a_worker_that_exits_says_how(pool_with):
    pool = pool_with(Dies)
    until_idle(pool)
    pool.submit(0, TASK)
    assert answer(pool) == Failure(TASK, "crash", PHASE_ORACLE, CHUNK_START, "exit code 3")


def test_an_exception_costs_the_task_and_not_the_worker(pool_with):
    pool = pool_with(Raises)
    until_idle(pool)
    before = pids(pool)
    pool.submit(0, TASK)
    said = answer(pool)
    assert (said.reason, said.index) == ("error", CHUNK_START)
    assert said.detail.strip().endswith("ValueError: victim")
    assert pids(pool) == before
    assert pool.restarts == 0
    assert works(pool)


def test_workers_that_never_start_are_given_up(pool_with):
    pool = pool_with(NeverStarts)
    with pytest.raises(WorkerUnavailableError, match="5 workers in a row ended before their first batch"):
        until_idle(pool)


def test_an_oracle_that_cannot_work_here_ends_the_campaign_with_its_reason(pool_with):
    pool = pool_with(CannotWorkHere)
    with pytest.raises(WorkerUnavailableError, match="twin: not on this machine"):
        until_idle(pool)


def test_closing_ends_the_processes(pool_with):
    pool = pool_with(Twin, 2)
    until_idle(pool)
    ended = pids(pool)
    pool.close()
    assert not any(map(alive, ended))


def test_killing_ends_the_processes_whatever_they_do(pool_with):
    pool = pool_with(Hangs, 2)
    busy(pool)
    ended = pids(pool)
    pool.kill()
    assert not any(map(alive, ended))


def test_states_say_what_each_worker_does(pool_with):
    pool = pool_with(Hangs, 2)
    assert {state.doing for state in pool.states()} == {"starting"}
    busy(pool)
    first, second = pool.states()
    assert (first.doing, first.batch, first.index, first.phase) == ("batch", 0, CHUNK_START, PHASE_ORACLE)
    assert (second.doing, second.batch) == ("idle", -1)
    assert min(first.rss, second.rss) > 10 << 20


def test_a_worker_says_what_it_runs():
    worker = Worker(setup_with(Twin))
    until(lambda: worker.receive() or worker.ready)
    worker.close()
    assert worker.versions.items() >= {"subject": "emulator", "oracle": "twin", "twin": "1"}.items()


HELD_BY_A_DRIVER = f"""
import sys
from support.misbehaving import Hangs, setup_with
from support.pools import until, until_idle
from emufuzz.fuzz.tasks import BatchTask
from emufuzz.fuzz.workers.local import LocalPool
if __name__ == "__main__":
    pool = LocalPool(setup_with(Hangs), 2)
    pool.start()
    until_idle(pool)
    pool.submit(0, BatchTask(0, 0, 500))
    until(lambda: pool.states()[0].index == {CHUNK_START})
    print("hangs", *(state.name for state in pool.states()), flush=True)
    sys.stdin.read()
"""


def test_workers_end_with_their_driver_even_while_a_case_hangs(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(HELD_BY_A_DRIVER)
    root = Path(misbehaving.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(root), str(root / "tests")))}
    driver = subprocess.Popen(
        [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    with driver:
        word, *names = driver.stdout.readline().split()
        workers = [int(name) for name in names]
        assert word == "hangs"
        assert len(workers) == 2
        assert all(map(alive, workers))
        everything = children(driver.pid)
        assert set(workers) <= set(everything)
        driver.kill()
    until(lambda: not any(map(alive, everything)))


def found(oracle, workers=1, cases=BATCH_SIZE * 2):
    setup = setup_with(oracle)
    campaign = Campaign(setup, Limits(cases), LocalPool(setup, workers, watchdog=8.0))
    totals = campaign.run()
    assert totals.cases == cases
    assert totals.balanced
    return campaign.new, totals, campaign.pool.restarts


def test_a_case_is_not_blamed_for_one_death(tmp_path, monkeypatch):
    monkeypatch.setenv(MARK, str(tmp_path / "mark"))
    findings, totals, restarts = found(AnswersTheSecondTime)
    assert restarts == 1
    assert findings == []
    assert totals == found(Twin)[1]


@pytest.mark.parametrize(("oracle", "kind", "detail"), [
    (Dies,  "crash", "exit code 3"),
    (Hangs, "hang",  "no progress for 8 s"),
])  # fmt: skip
def test_a_case_that_takes_three_workers_with_it_is_a_finding(oracle, kind, detail):
    findings, _, restarts = found(oracle, 2)
    assert [(f.kind, f.case.id, f.batch, f.index) for f in findings] == [(kind, oracle.victim, 0, 300)]
    assert findings[0].differences[0].oracle == detail
    assert restarts == 3  # the batch, then twice the case by itself


def test_a_finding_that_ends_its_worker_is_shrunk_by_nobody(pool_with):
    (finding,), *_ = found(Dies)
    pool = pool_with(Dies)
    until_idle(pool)
    from emufuzz.fuzz.shrink import Limits as ShrinkLimits

    task = ShrinkTask(finding, ShrinkLimits())
    pool.submit(0, task)
    said = answer(pool)
    assert (said.task, said.reason, said.detail) == (task, "crash", "exit code 3")
