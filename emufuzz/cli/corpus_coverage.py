"""`emufuzz corpus coverage`: how much a corpus reaches, and what it does not."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from emufuzz.case.json import case_to_json
from emufuzz.cli.errors import InputError
from emufuzz.cli.progress import counted
from emufuzz.fuzz.corpus.directory import read_corpus
from emufuzz.fuzz.corpus.measure import ROOMS, Reach, measure
from emufuzz.report.columns import table

_ALL = (0.0, 0.0, 0.0)


def limits_of(text: str) -> tuple[float, ...]:
    """The percentages that `--fail-under` names: of leaves, of branches of emulator/ and of kvm/."""
    if not text:
        return _ALL
    try:
        limits = tuple(float(part) for part in text.split(","))
    except ValueError:
        limits = ()
    if len(limits) != len(_ALL) or not all(0 <= limit <= 100 for limit in limits):
        raise InputError("--fail-under", f"expected three percentages, as 99,97,90; got {text!r}")
    return limits


def measured(directory: Path) -> Reach:
    """Measure a corpus; InputError if it has no cases."""
    lines = [case_to_json(entry.case) for _, entry in counted(read_corpus(directory))]
    if not lines:
        raise InputError(str(directory), "no cases in it")
    return measure(lines)


def json_of(reach: Reach) -> str:
    """One JSON object, with all that is missing."""
    return json.dumps(
        {
            "cases": reach.cases,
            "legal": reach.legal,
            "reached": reach.legal - len(reach.unreached),
            "unreached": reach.unreached,
            "branches": reach.branches,
            "missing": [branch._asdict() for branch in reach.missing],
        }
    )


def lines_of(reach: Reach, *, missing: bool) -> Iterator[str]:
    """A table, and what is missing if asked for."""
    parts = [("leaves x modes", reach.legal, reach.legal - len(reach.unreached))]
    parts += [(f"branches of {room}/", *reach.branches[room]) for room in ROOMS]
    rows = [
        (name, str(total), str(done), f"{share:.2f} %")
        for (name, total, done), share in zip(parts, reach.percentages(), strict=True)
    ]
    yield f"{reach.cases} cases"
    yield from table(["what", "all", "reached", "share"], rows, 1000)
    if missing:
        yield from _missing(reach)


def _missing(reach: Reach) -> Iterator[str]:
    yield from (f"not reached: {leaf} in {mode}" for leaf, mode in reach.unreached)
    places: dict[tuple[str, str], list[str]] = defaultdict(list)
    for branch in reach.missing:
        to = "end" if branch.to < 0 else str(branch.to)
        places[branch.file, branch.function or "(module)"].append(f"{branch.line}->{to}")
    for (file, function), arcs in places.items():
        yield f"not taken: {file} {function}: {' '.join(arcs)}"
