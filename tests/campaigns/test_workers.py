"""The same campaign with other workers: whatever they are, it finds and counts the same."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
from support.campaigns import finish, found, start, write_entry

BEGIN = ("fuzz", "--cases", 9000, "--modes", "real,prot64", "--seed-bug", "leave-rsp", "--oracles", "unicorn")


@pytest.fixture(scope="module")
def entry(tmp_path_factory):
    return write_entry(tmp_path_factory.mktemp("bin"))


@pytest.fixture(scope="module")
def out_of_one(entry, tmp_path_factory):
    """The campaign, run with one worker."""
    out = tmp_path_factory.mktemp("one") / "out"
    code, _, err = finish(start(entry, *BEGIN, "--workers", "local:1", "--out", out))
    assert (code, err) == (1, "")
    return out


@pytest.fixture(scope="module")
def with_one(out_of_one):
    """What the campaign finds with one worker."""
    return found(out_of_one)


def reports(entry, out):
    """What `emufuzz coverage` says of a campaign, as CSV and as JSON without the times of that machine."""
    code, csv, err = finish(start(entry, "coverage", out, "--csv"))
    assert (code, err) == (0, "")
    code, text, err = finish(start(entry, "coverage", out, "--json"))
    assert (code, err) == (0, "")
    report = json.loads(text)
    assert report.pop("elapsed")[-1][1] == 9000
    return csv, report


def test_findings_do_not_depend_on_the_number_of_workers(entry, out_of_one, with_one, tmp_path):
    code, _, err = finish(start(entry, *BEGIN, "--workers", "local:2", "--out", tmp_path / "out"))
    assert (code, err) == (1, "")
    assert found(tmp_path / "out") == with_one
    assert reports(entry, tmp_path / "out") == reports(entry, out_of_one)


@pytest.mark.soak  # on a busy machine a cluster takes minutes to start
def test_findings_are_the_same_on_a_ray_cluster_of_two(entry, with_one, tmp_path):
    if find_spec("ray") is None:
        pytest.skip("ray: the package is missing")
    code, _, err = finish(start(entry, *BEGIN, "--workers", "ray:2", "--out", tmp_path / "out"))
    assert (code, err) == (1, "")
    assert found(tmp_path / "out") == with_one


def test_a_campaign_goes_on_with_other_workers(entry, with_one, tmp_path):
    out = tmp_path / "out"
    code, _, err = finish(start(entry, *BEGIN, "--cases", 3000, "--workers", "local:2", "--out", out))
    assert (code, err) == (1, "")
    code, _, err = finish(
        start(entry, "fuzz", "--resume", "--cases", 9000, "--workers", "local:1", "--out", out)
    )
    assert code in {0, 1}
    assert err == ""
    assert found(out) == with_one
