"""Workers on a Ray cluster: each way in which one can end, and what becomes of its task."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from support.misbehaving import CannotWorkHere, Dies, Eats, Hangs, Liar, NeverStarts, Raises, Twin, setup_with
from support.pools import alive, answer, until, until_idle

from emufuzz.fuzz.campaign import Campaign, Limits
from emufuzz.fuzz.loop import CHUNK, PHASE_ORACLE
from emufuzz.fuzz.tasks import BatchTask, Done, Failure
from emufuzz.fuzz.workers.local import LocalPool, WorkerUnavailableError

TASK = BatchTask(0, 0, 500)
CHUNK_START = 300 // CHUNK * CHUNK


def told(pool, place=0):
    """What a worker says that it does, once it has said so."""
    until(lambda: pool.states()[place].name)
    return pool.states()[place]


def pid_of(pool, place=0):
    """The worker process of a seat, which is on this machine."""
    return int(told(pool, place).name.rpartition(":")[2])


def parent(pid):
    """The process that keeps a worker process: the actor's."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def works(pool):
    """Whether every worker does a batch."""
    until_idle(pool)
    results = []
    for worker in range(pool.size):
        pool.submit(worker, BatchTask(1, 0, 100))
        results.append(answer(pool))
    return all(isinstance(said, Done) and said.value.cases == 100 for said in results)


def run(pool):
    """What becomes of the task of the first worker, and its process."""
    until_idle(pool)
    pid = pid_of(pool)
    pool.submit(0, TASK)
    return answer(pool), pid


def test_a_batch_on_the_cluster_is_the_batch_here(pool_with):
    pool = pool_with(Liar)
    said, _ = run(pool)
    local = LocalPool(setup_with(Liar), 1)
    local.start()
    until_idle(local)
    local.submit(0, TASK)
    here = answer(local)
    local.close()
    assert said.value == here.value
    assert said.value.bucket_cases


def test_workers_say_what_they_do(pool_with):
    pool = pool_with(Hangs)
    assert pool.states()[0].doing == "starting"
    until_idle(pool)
    assert told(pool).doing == "idle"
    pool.submit(0, TASK)

    def there():
        state = pool.states()[0]
        return (state.doing, state.batch, state.index) == ("batch", 0, CHUNK_START)

    until(there)
    assert pool.states()[0].rss > 10 << 20


def test_a_worker_process_that_exits_is_replaced(pool_with):
    pool = pool_with(Dies)
    said, pid = run(pool)
    assert said == Failure(TASK, "crash", PHASE_ORACLE, CHUNK_START, "exit code 3")
    assert pool.restarts == 1
    assert not alive(pid)
    assert works(pool)


def test_a_worker_process_that_makes_no_progress_is_replaced(pool_with):
    pool = pool_with(Hangs, watchdog=8.0)
    said, pid = run(pool)
    assert said == Failure(TASK, "hang", PHASE_ORACLE, CHUNK_START, "no progress for 8 s")
    assert not alive(pid)
    assert works(pool)


def test_a_worker_process_that_takes_too_much_memory_is_replaced(pool_with):
    pool = pool_with(Eats, memory=400 << 20)
    said, pid = run(pool)
    assert said == Failure(TASK, "memory", PHASE_ORACLE, CHUNK_START, "more than 400 MiB of memory")
    assert not alive(pid)
    assert works(pool)


def test_an_exception_costs_the_task_and_not_the_worker(pool_with):
    pool = pool_with(Raises)
    said, pid = run(pool)
    assert (said.reason, said.index) == ("error", CHUNK_START)
    assert said.detail.strip().endswith("ValueError: victim")
    assert pool.restarts == 0
    assert pid_of(pool) == pid
    assert works(pool)


def test_a_machine_that_goes_away_loses_its_task_and_blames_no_case(pool_with):
    pool = pool_with(Hangs)
    until_idle(pool)
    pid = pid_of(pool)
    pool.submit(0, TASK)
    until(lambda: pool.states()[0].index == CHUNK_START)
    os.kill(parent(pid), signal.SIGKILL)
    said = answer(pool)
    assert (said.task, said.reason) == (TASK, "lost")
    until(lambda: not alive(pid))
    assert pool.restarts == 1
    assert works(pool)


def test_an_oracle_that_cannot_work_there_ends_the_campaign_with_its_reason(pool_with, monkeypatch):
    monkeypatch.setattr("emufuzz.fuzz.workers.ray_pool.running_here", lambda _: {})
    pool = pool_with(CannotWorkHere)
    with pytest.raises(WorkerUnavailableError, match="twin: not on this machine"):
        until_idle(pool)


def test_workers_that_never_start_are_given_up(pool_with, monkeypatch):
    monkeypatch.setattr("emufuzz.fuzz.workers.ray_pool.running_here", lambda _: {})
    pool = pool_with(NeverStarts)
    with pytest.raises(WorkerUnavailableError, match=r"5 workers in a row went away; .*its first batch"):
        until_idle(pool)


def test_a_machine_with_other_versions_is_refused(pool_with, monkeypatch):
    from emufuzz.fuzz.workers import ray_pool

    here = ray_pool.running_here
    monkeypatch.setattr(ray_pool, "running_here", lambda setup: here(setup) | {"sources": "0123456789ab"})
    pool = pool_with(Twin)
    with pytest.raises(
        WorkerUnavailableError, match=r"take part: sources [0-9a-f]{12} there, sources 0123456789ab here"
    ):
        until_idle(pool)


def test_closing_ends_the_processes(pool_with):
    pool = pool_with(Twin, 2)
    until_idle(pool)
    pids = [pid_of(pool, place) for place in range(2)]
    pool.close()
    until(lambda: not any(map(alive, pids)))


def test_a_campaign_finds_the_same_on_the_cluster(pool_with):
    setup = setup_with(Liar)
    on_cluster = Campaign(setup, Limits(5000), pool_with(Liar, 2))
    here = Campaign(setup, Limits(5000), LocalPool(setup, 1))
    assert on_cluster.run() == here.run()
    assert on_cluster.new == here.new
    assert here.new


def test_a_case_that_ends_its_workers_is_a_finding_on_the_cluster_too(pool_with):
    setup = setup_with(Dies)
    running = Campaign(setup, Limits(2048), pool_with(Dies, 2))
    totals = running.run()
    assert totals.balanced
    assert [(f.kind, f.index) for f in running.new] == [("crash", 300)]
    assert running.pool.restarts == 3
