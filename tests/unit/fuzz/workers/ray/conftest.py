from __future__ import annotations

import os
from pathlib import Path

import pytest
from support.misbehaving import Twin, setup_with

from emufuzz.fuzz.workers.choose import make_pool
from emufuzz.fuzz.workers.local import WorkerUnavailableError

TESTS = Path(__file__).parents[4]


@pytest.fixture(scope="session")
def cluster():
    """A cluster of this machine alone, of two workers; skipped only where the library is missing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join((str(TESTS.parent), str(TESTS))))  # for the workers
        try:
            pool = make_pool("ray:2", setup_with(Twin))
        except WorkerUnavailableError as error:
            if "missing" not in str(error):
                raise
            pytest.skip(str(error))
        yield pool._cluster
        pool._cluster.close()


@pytest.fixture
def pool_with(cluster, monkeypatch):
    """Makes started pools on the cluster, and ends them, but not the cluster."""
    from emufuzz.fuzz.workers.ray_pool import RayPool

    monkeypatch.setattr(cluster, "close", lambda: None)
    pools = []

    def make(oracle, size=1, **options):
        pools.append(RayPool(setup_with(oracle), cluster, size, **options))
        pools[-1].start()
        return pools[-1]

    yield make
    for pool in pools:
        pool.kill()
