"""SIGKILL at any moment, of driver, workers or both: a resumed campaign ends as one nobody touched."""

from __future__ import annotations

import os
import random
import signal
import time
from itertools import pairwise

import pytest
from support.campaigns import batch_rows, children, corpus_rows, finish, found, start, write_entry

CASES = 14_000
WORKERS = ("--workers", "local:2")
ALONE = ("--oracles", "unicorn")
BEGIN = ("fuzz", "--cases", CASES, "--modes", "real,prot64", "--seed-bug", "leave-rsp", *ALONE, *WORKERS)
#: The last batches of it work with a corpus.
GUIDED = (*BEGIN, "--generator", "guided")
AGAIN = ("fuzz", "--resume", *WORKERS)
KILLS = 3
#: A run is killed after at most so many times what an untouched one takes, starts and all.
LONGEST = 1.1


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_entry(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def untouched(entry, tmp_path_factory):
    """What the campaign finds if nobody kills anything, and the seconds that it takes."""
    return whole_run(entry, tmp_path_factory.mktemp("whole") / "out", BEGIN)


def whole_run(entry, out, begin):
    began = time.monotonic()
    code, _, err = finish(start(entry, *begin, "--out", out))
    assert (code, err) == (1, "")
    return found(out), time.monotonic() - began


def kill(process, whom):
    """Kill what is named, if it is still there."""
    workers = children(process.pid)
    victims = workers if whom == "workers" else [process.pid, *workers] if whom == "both" else [process.pid]
    for pid in victims:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def disturbed(entry, out, rng, seconds, begin):
    """Run the campaign to its end, killing something now and then; gives how often something was hit."""
    hits = 0
    for _ in range(KILLS):
        made = (out / "campaign.sqlite").exists()
        process = start(entry, *(AGAIN if made else begin), "--out", out)
        time.sleep(rng.uniform(0.02, LONGEST) * seconds)
        hits += process.poll() is None
        kill(process, rng.choice(("driver", "workers", "both")))
        code, _, err = finish(process)
        assert code in {0, 1, 2, -signal.SIGKILL}, err
        assert code != 2 or "all of its" in err, err
    made = (out / "campaign.sqlite").exists()
    code, _, err = finish(start(entry, *(("fuzz", "--resume") if made else begin), "--out", out))
    assert code in {0, 1} or "all of its" in err, err
    return hits


def check(entry, out, seed, untouched, begin=BEGIN):
    rng = random.Random(seed)
    whole, seconds = untouched
    hits = disturbed(entry, out, rng, seconds, begin)
    after = found(out)
    assert after == whole
    rows = batch_rows(out)
    assert sum(cases for _, _, cases in rows) == CASES
    assert all(a[:2] < b[:2] for a, b in pairwise(rows))
    assert not list(out.rglob("*.tmp"))
    return hits


def test_killed_and_resumed(entry, tmp_path, untouched):
    assert any(check(entry, tmp_path / str(seed), seed, untouched) for seed in range(1, 6))


@pytest.mark.slow
def test_a_guided_campaign_killed_and_resumed(entry, tmp_path):
    whole = whole_run(entry, tmp_path / "whole", GUIDED)
    corpus = corpus_rows(tmp_path / "whole")
    assert len(corpus) > 20
    for n in range(3):
        check(entry, tmp_path / str(n), 300 + n, whole, GUIDED)
        assert corpus_rows(tmp_path / str(n)) == corpus


@pytest.mark.parametrize(
    "tens",
    [
        pytest.param(0, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.soak) for n in range(1, 10)),
    ],
)
def test_killed_and_resumed_100_times(entry, tmp_path, untouched, tens):
    """Campaigns until ten kills have hit something: where all goes faster than before some do not."""
    hits = campaigns = 0
    while hits < 10:
        hits += check(entry, tmp_path / str(campaigns), 1000 * tens + campaigns, untouched)
        campaigns += 1
        assert campaigns < 60
