"""Every case in corpus/regressions gives what it must give; its id says what once went wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from emufuzz.case.delta import normalise_expect, outcome_to_delta
from emufuzz.case.vectors import read_vectors
from emufuzz.subject.flat import FlatSubject

CORPUS = Path(__file__).parents[2] / "corpus" / "regressions"
VECTORS = [
    pytest.param(case, expect, id=f"{path.stem}-{case.id}")
    for path in sorted(CORPUS.glob("*.jsonl"))
    for case, expect in read_vectors(path)
]


def test_there_are_regressions():
    assert VECTORS


@pytest.mark.parametrize(("case", "expect"), VECTORS)
def test_regression(case, expect):
    (outcome,) = FlatSubject().run([case])
    assert outcome_to_delta(case, outcome) == normalise_expect(case, expect)
