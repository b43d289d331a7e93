"""Which results cases of each exit path must lead to (docs/kvm-paths.md), and how often they do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from emufuzz.fuzz.kvm.generate import PathOptions, generator_of
from emufuzz.fuzz.kvm.results import result_of
from emufuzz.subject.kvm import KvmSubject

BATCH = 2048
DOCUMENT = Path(__file__).parents[2] / "docs" / "kvm-paths.md"


def results_of(path, count, seed=7):
    """Result -> cases, of the first `count` generated cases of a path; and the first crash."""
    subject, found, crash = KvmSubject(), Counter(), None
    for number in range(-(-count // BATCH)):
        size = min(BATCH, count - number * BATCH)
        cases = generator_of(seed, number, PathOptions(paths=(path,))).cases(size)
        for outcome in subject.run(cases):
            found.update(result_of(outcome))
            if outcome.crash and crash is None:
                crash = f"{outcome.id}: {outcome.crash}"
    return found, crash


def documented():
    """Path -> (results that must be seen, results that may be), from the table in docs/kvm-paths.md."""
    lines = [line for line in DOCUMENT.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    head = next(i for i, line in enumerate(lines) if line.startswith("| result | `"))
    columns = [cell.strip(" `") for cell in lines[head].strip("|").split("|")][1:]
    table = {}
    for line in lines[head + 1 :]:
        name, *cells = [cell.strip(" `") for cell in line.strip("|").split("|")]
        if len(cells) != len(columns):
            break
        for path, cell in zip(columns, cells, strict=True):
            must, may = table.setdefault(path, (set(), set()))
            if cell == "x":
                must.add(name)
            elif cell == "(x)":
                may.add(name)
    return table
