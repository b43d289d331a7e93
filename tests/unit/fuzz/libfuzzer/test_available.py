"""Where atheris is missing, or libFuzzer cannot run."""

from __future__ import annotations

import importlib.util

import pytest

from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.workers.choose import WorkersError, make_fuzzer_pool
from emufuzz.fuzz.workers.local import WorkerUnavailableError

SETUP = CampaignConfig().setup()


def test_the_missing_extra_is_named_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        WorkerUnavailableError, match=r"atheris: the package is missing; install emufuzz\[atheris\]"
    ):
        make_fuzzer_pool("local:1", SETUP, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


@pytest.mark.parametrize("workers", ["ray", "ray:head:6379", "nonsense", "local:0"])
def test_workers_that_cannot_be_are_refused(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(WorkersError):
        make_fuzzer_pool(workers, SETUP, tmp_path)
