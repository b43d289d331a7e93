"""Workers by name."""

from __future__ import annotations

import os
import sys

import pytest
from support.misbehaving import Twin, setup_with

from emufuzz.fuzz.workers.choose import MAX_WORKERS, WorkersError, cores, make_pool
from emufuzz.fuzz.workers.local import LocalPool, WorkerUnavailableError

SETUP = setup_with(Twin)


@pytest.mark.parametrize(("text", "size"), [
    ("local:1",            1),
    ("local:3",            3),
    ("3",                  3),
    (f"local:{MAX_WORKERS}", MAX_WORKERS),
    ("local",              min(len(os.sched_getaffinity(0)), MAX_WORKERS)),
])  # fmt: skip
def test_workers_of_this_machine(text, size):
    pool = make_pool(text, SETUP)
    assert isinstance(pool, LocalPool)
    assert pool.size == size
    assert pool.restarts == 0
    assert pool.idle() == []


def test_cores_are_those_that_this_process_may_use():
    assert cores() == len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("text", "reason"), [
    ("",                 r"expected local\[:N\], ray\[:N\] or ray:ADDRESS\[,N\], got ''"),
    ("slurm:4",          r"got 'slurm:4'"),
    ("4:4",              r"got '4:4'"),
    ("local:0",          r"must be 1 to 256, got '0'"),
    ("local:257",        r"must be 1 to 256, got '257'"),
    ("local:-1",         r"must be 1 to 256, got '-1'"),
    ("local:two",        r"must be 1 to 256, got 'two'"),
    ("local:1" + "0" * 5000, r"must be 1 to 256"),
])  # fmt: skip
def test_workers_that_cannot_be(text, reason):
    with pytest.raises(WorkersError, match=reason):
        make_pool(text, SETUP)


def test_ray_without_the_library_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("ray_cluster", "ray_pool"):
        monkeypatch.delitem(sys.modules, f"emufuzz.fuzz.workers.{name}", raising=False)
    with pytest.raises(
        WorkerUnavailableError, match=r"^ray: the package is missing; install emufuzz\[ray\]$"
    ):
        make_pool("ray:2", SETUP)
