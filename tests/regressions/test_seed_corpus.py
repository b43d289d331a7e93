"""The seed corpus: readable, complete per family, and no unexplained disagreement in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from emufuzz.arch.leaves import FAMILIES, family_of
from emufuzz.case.json import case_from_json
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.seeds import write_seeds
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

SEEDS = Path(__file__).parents[2] / "corpus" / "seeds"
FILES = sorted(SEEDS.glob("*.jsonl"))


@pytest.fixture(scope="module")
def loop():
    return CampaignLoop(FlatSubject(events=False), UnicornOracle())


def read(path):
    return [case_from_json(line) for line in path.read_bytes().splitlines()]


def test_every_family_that_kvm_takes_has_seeds():
    assert {path.stem for path in FILES} == set(FAMILIES) - {"notimpl"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_subject_and_oracle_agree_or_the_reason_is_known(loop, path):
    cases = read(path)
    result = loop.run_batch(0, cases)
    assert 20 <= len(cases) <= 50
    assert not result.bucket_cases
    assert result.agreed + sum(result.skipped.values()) == len(cases)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_cases_are_of_the_family_of_their_file(path):
    cases = read(path)
    outcomes = FlatSubject(events=False).run(cases)
    assert {family_of(outcome.leaf) for outcome in outcomes} == {path.stem}
    assert len({case.id for case in cases}) == len(cases)


def test_the_corpus_is_what_the_generator_writes(tmp_path):
    write_seeds(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in FILES
    }
