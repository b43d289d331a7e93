"""The distilled corpus reaches what docs/corpus.md says; what it does not is listed there with a reason."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from emufuzz.case.json import case_to_json
from emufuzz.fuzz.corpus.directory import read_corpus
from emufuzz.fuzz.corpus.legal import legal_pairs, reached_pairs
from emufuzz.fuzz.corpus.measure import measure
from emufuzz.fuzz.corpus.observe import Observer

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "corpus" / "distilled"
DOC = ROOT / "docs" / "corpus.md"
#: Percentages; docs/corpus.md lists what is missing, and why.
LEAVES, EMULATOR, KVM = 99.0, 97.0, 90.0
MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def reach():
    return measure([case_to_json(entry.case) for _, entry in read_corpus(CORPUS)])


def test_it_is_small_and_every_case_runs():
    files = list(CORPUS.glob("*.jsonl"))
    assert sum(file.stat().st_size for file in files) < MOST_BYTES
    observer = Observer(arcs=False)
    cells, names = [], set()
    for family, entry in read_corpus(CORPUS):
        observed = observer.observe(entry.case)
        assert observed is not None, entry.case.id
        cells.append(observed.cell)
        names.add((family, entry.case.id))
    assert len(names) == len(cells)
    assert len(reached_pairs(cells)) >= LEAVES / 100 * len(legal_pairs())


@pytest.mark.slow
def test_it_reaches_leaves_and_branches(reach):
    leaves, emulator, kvm = reach.percentages()
    assert leaves >= LEAVES
    assert emulator >= EMULATOR
    assert kvm >= KVM


@pytest.mark.slow
def test_what_is_missing_is_listed_with_its_reason(reach):
    listed = set(re.findall(r"`((?:emulator|kvm)/[\w/]+\.py)`", DOC.read_text("utf-8")))
    missing = {branch.file for branch in reach.missing}
    assert missing <= listed, sorted(missing - listed)
