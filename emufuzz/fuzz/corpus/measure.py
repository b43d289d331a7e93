"""How much a corpus reaches: legal leaves per mode, and branches of emulator/ and kvm/ by coverage.py.

Branches are counted in a process of its own, in which measurement begins before the first module of
these rooms is imported: `python -m emufuzz.fuzz.corpus.measure`, cases as JSON lines on standard input.
Importing this module imports nothing of them either.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from pkgutil import walk_packages
from typing import Any, Final, NamedTuple

import coverage

#: The rooms that are measured.
ROOMS: Final = ("emulator", "kvm")


class MeasureError(Exception):
    """Measuring failed; the message says why."""


class Branch(NamedTuple):
    """A branch that was not taken: from a line to a line, which is negative for the end of a function."""

    file: str
    function: str
    line: int
    to: int


class Reach(NamedTuple):
    """What a corpus reaches.

    Attributes:
        cases: How many cases were run; those that their subject cannot take do not count.
        legal: (leaf, mode) of every implemented leaf in every mode in which the tables allow it.
        reached: Those of them that a case decoded to.
        branches: Room -> branches in it, and how many of them were taken.
        missing: The branches that were not.
    """

    cases: int
    legal: int
    unreached: list[tuple[str, str]]
    branches: dict[str, tuple[int, int]]
    missing: list[Branch]

    def percentages(self) -> tuple[float, float, float]:
        """Of legal (leaf, mode) pairs, of branches of emulator/ and of branches of kvm/."""
        emulator, kvm = (_percent(*self.branches[room]) for room in ROOMS)
        return _percent(self.legal, self.legal - len(self.unreached)), emulator, kvm


def _percent(total: int, done: int) -> float:
    return 100 * done / total if total else 0.0


def measure(lines: Iterable[bytes]) -> Reach:
    """What cases, one JSON object per line, reach when they are run in a process of its own.

    Raises:
        MeasureError: The process failed.
    """
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__]
    done = subprocess.run(  # noqa: S603 - our own module
        command, input=b"".join(line + b"\n" for line in lines), capture_output=True, check=False
    )
    if done.returncode:
        raise MeasureError(done.stderr.decode(errors="replace").strip().splitlines()[-1])
    value = json.loads(done.stdout)
    return Reach(
        value["cases"],
        value["legal"],
        [tuple(pair) for pair in value["unreached"]],
        {room: tuple(counts) for room, counts in value["branches"].items()},
        [Branch(*branch) for branch in value["missing"]],
    )


def main() -> None:
    """Measure the cases on standard input, and print what they reach as one JSON object."""
    gauge = coverage.Coverage(
        branch=True,
        source_pkgs=[f"emufuzz.{room}" for room in ROOMS],
        data_file=None,
        config_file=False,
    )
    gauge.start()
    for room in ROOMS:
        package = import_module(f"emufuzz.{room}")
        for module in walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    result = _run(sys.stdin.buffer)
    gauge.stop()
    json.dump(result | _branches(gauge), sys.stdout)


def _run(lines: Iterable[bytes]) -> dict[str, Any]:
    """Run the cases; counts of cases and pairs."""
    # not before measurement has begun
    from emufuzz.case.json import case_from_json  # noqa: PLC0415
    from emufuzz.fuzz.corpus.legal import legal_pairs, reached_pairs  # noqa: PLC0415
    from emufuzz.fuzz.corpus.observe import Observer  # noqa: PLC0415
    from emufuzz.subject.kvm import KvmSubject  # noqa: PLC0415

    observer, traced, cells = Observer(arcs=False), KvmSubject(trace=True), []
    for line in lines:
        case = case_from_json(line)
        observed = observer.observe(case)
        if observed is None:
            continue
        cells.append(observed.cell)
        if case.path is not None:
            traced.run((case,))
            _format(traced)
    unreached = sorted(legal_pairs() - reached_pairs(cells))
    return {"cases": len(cells), "legal": len(legal_pairs()), "unreached": unreached}


def _format(subject: Any) -> None:
    """Show the tracepoints as `repro --trace` does."""
    from emufuzz.kvm.trace import format_trace  # noqa: PLC0415

    if subject.trace is not None:
        format_trace(subject.trace.events)


def _branches(gauge: coverage.Coverage) -> dict[str, Any]:
    """Counts per room, and what is missing."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "coverage.json"
        gauge.json_report(outfile=str(report))
        files = json.loads(report.read_bytes())["files"]
    counts = {room: [0, 0] for room in ROOMS}
    missing = []
    for path, found in files.items():
        name = _below_package(path)
        total = counts[name.split("/")[0]]
        total[0] += found["summary"]["num_branches"]
        total[1] += found["summary"]["covered_branches"]
        for function, part in found["functions"].items():
            missing += [(name, function, line, to) for line, to in part["missing_branches"]]
    return {"branches": counts, "missing": sorted(missing)}


def _below_package(path: str) -> str:
    parts = Path(path).parts
    return "/".join(parts[len(parts) - parts[::-1].index("emufuzz") :])


if __name__ == "__main__":
    main()
