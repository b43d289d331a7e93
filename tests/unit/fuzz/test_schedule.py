"""Which batch comes next, and which case is blamed for what happens to workers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from emufuzz.fuzz.accounting import BatchResult
from emufuzz.fuzz.loop import PHASE_GENERATE, PHASE_ORACLE
from emufuzz.fuzz.schedule import BATCH_SIZE, Schedule, ScheduleError
from emufuzz.fuzz.tasks import BatchTask, Failure


def take(schedule):
    return schedule.take(frozenset(), new=True)


def fail(schedule, task, index, phase=PHASE_ORACLE):
    """Whether a case is blamed when a worker ends; and the task that repeats it."""
    blamed = schedule.failed(Failure(task, "crash", phase, index, "killed by signal 9"), task)
    return blamed, take(schedule)


def test_batches_come_in_order_up_to_the_budget():
    schedule = Schedule(cases=2 * BATCH_SIZE + 10)
    tasks = [take(schedule) for _ in range(3)]
    assert [(t.number, t.first, t.stop) for t in tasks] == [
        (0, 0, BATCH_SIZE),
        (1, 0, BATCH_SIZE),
        (2, 0, 10),
    ]
    assert not schedule.more()
    assert take(schedule) is None


def test_a_campaign_goes_on_within_a_batch():
    schedule = Schedule((3, 100), cases=4 * BATCH_SIZE)
    task = take(schedule)
    assert (task.number, task.first, task.stop) == (3, 100, BATCH_SIZE)
    assert not schedule.more()


def test_results_are_merged_in_order():
    schedule = Schedule()
    tasks = [take(schedule) for _ in range(3)]
    for task in reversed(tasks):
        assert schedule.merged() is None
        schedule.done(task, BatchResult(task.number))
    assert [schedule.merged().result.number for _ in range(3)] == [0, 1, 2]
    assert schedule.merged() is None


def test_a_batch_that_is_not_merged_holds_the_others_up():
    schedule = Schedule(workers=2)
    first, *others = (take(schedule) for _ in range(16))
    assert take(schedule) is None
    for task in others:
        schedule.done(task, BatchResult(task.number))
    assert take(schedule) is None
    schedule.done(first, BatchResult(0))
    while schedule.merged() is not None:
        pass
    assert take(schedule).number == 16


def test_a_case_is_blamed_when_two_careful_runs_end_on_it():
    schedule = Schedule()
    blamed, task = fail(schedule, take(schedule), 256)
    assert (blamed, task.careful, task.suspect) == (False, True, None)
    blamed, task = fail(schedule, task, 300)
    assert (blamed, task.suspect, task.excluded) == (False, 300, frozenset())
    blamed, task = fail(schedule, task, 300)
    assert (blamed, task.suspect, task.excluded) == (True, None, frozenset({300}))


def test_two_deaths_at_different_cases_blame_none():
    schedule = Schedule()
    _, task = fail(schedule, take(schedule), 0)
    for index in (10, 20, 10, 20):
        blamed, task = fail(schedule, task, index)
        assert not blamed
        assert task.suspect == index


def test_a_worker_that_ends_before_the_first_case_blames_none():
    schedule = Schedule()
    first = take(schedule)
    blamed, task = fail(schedule, first, 0, PHASE_GENERATE)
    assert (blamed, task) == (False, first)
    careful = replace(first, careful=True, suspect=0, excluded=frozenset({5}))
    assert fail(schedule, careful, 0, PHASE_GENERATE) == (False, careful)


def test_a_case_is_blamed_once():
    schedule = Schedule()
    task = replace(take(schedule), careful=True, excluded=frozenset({300}), suspect=300)
    assert fail(schedule, task, 300) == (False, task)


def test_a_batch_that_cannot_be_generated_ends_the_campaign():
    schedule = Schedule()
    task = take(schedule)
    for _ in range(9):
        assert fail(schedule, task, 0, PHASE_GENERATE) == (False, task)
    with pytest.raises(
        ScheduleError, match="batch 0 ended 10 workers before its first case: crash: killed by signal 9"
    ):
        fail(schedule, task, 0, PHASE_GENERATE)


def test_a_lost_batch_is_repeated_as_it_was():
    schedule = Schedule()
    task = take(schedule)
    schedule.again(task)
    assert schedule.waiting
    assert take(schedule) == task
    assert isinstance(task, BatchTask)
