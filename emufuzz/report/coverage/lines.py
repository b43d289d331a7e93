"""Line and branch coverage of the emulator and of the model of KVM, through coverage.py.

Cases are run in a process of their own, in which measuring begins before the modules under test are
imported: what runs at import counts too.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, NamedTuple

from emufuzz.case.model import Case

#: Packages whose lines count, below emufuzz.
PACKAGES: Final = ("emulator", "kvm")
#: How a report can be written: HTML into a directory, the others into a file.
FORMATS: Final = ("html", "lcov", "cobertura", "json")

_CHILD: Final = """
import sys, coverage
sys.path[:] = {path!r}
measured = coverage.Coverage({data!r}, branch=True, source={source!r}, config_file=False, messages=False)
measured.start()
from emufuzz.report.coverage.lines import run_pickled
try:
    run_pickled(sys.stdin.buffer)
finally:
    measured.stop()
    measured.save()
"""


class LinesError(Exception):
    """Measuring or reporting went wrong; the message says how."""


class Share(NamedTuple):
    """Lines and branches of a package that ran, of those that there are."""

    lines: int
    all_lines: int
    branches: int
    all_branches: int


class Lines:
    """The measured lines of a run, as coverage.py has them."""

    def __init__(self, measured: Any, work: Path) -> None:
        self._measured = measured
        self._work = work
        self._report = json.loads(self._written("json", work / "totals.json").read_text("utf-8"))

    def total(self) -> Share:
        """The share of all packages together."""
        return _share([self._report["totals"]])

    def packages(self) -> dict[str, Share]:
        """Package -> its share."""
        files: dict[str, list[dict[str, int]]] = {name: [] for name in PACKAGES}
        for path, found in self._report["files"].items():
            parts = Path(path).parts
            package = parts[len(parts) - 1 - parts[::-1].index("emufuzz") + 1]
            files[package].append(found["summary"])
        return {name: _share(summaries) for name, summaries in files.items()}

    def write(self, form: str, path: Path) -> None:
        """Write a report in one of FORMATS; HTML becomes a directory.

        Raises:
            OSError: It cannot be written.
        """
        if form == "html":
            path.mkdir(parents=True, exist_ok=True)
            self._written(form, path)
            return
        from emufuzz.fuzz.files import write_atomically  # noqa: PLC0415 - not in the measured process

        write_atomically(path, self._written(form, self._work / "report").read_bytes())

    def _written(self, form: str, path: Path) -> Path:
        measured, name = self._measured, str(path)
        if form == "html":
            measured.html_report(directory=name)
        elif form == "lcov":
            measured.lcov_report(outfile=name)
        elif form == "cobertura":
            measured.xml_report(outfile=name)
        else:
            measured.json_report(outfile=name)
        return path


def _share(summaries: list[dict[str, int]]) -> Share:
    keys = ("covered_lines", "num_statements", "covered_branches", "num_branches")
    return Share(*(sum(summary[key] for summary in summaries) for key in keys))


def measure(cases: Iterable[Case], use: Callable[[Lines], None]) -> None:
    """Run cases and hand what was measured to `use`, which may write reports of it.

    Raises:
        LinesError: The process that ran them failed.
    """
    import coverage  # noqa: PLC0415 - the measured process imports this module

    with tempfile.TemporaryDirectory(prefix="emufuzz-lines-") as name:
        work = Path(name)
        data = work / "data"
        _run(cases, data)
        measured = coverage.Coverage(data_file=str(data), config_file=False, messages=False)
        measured.load()
        use(Lines(measured, work))


def _run(cases: Iterable[Case], data: Path) -> None:
    package = Path(__file__).parents[2]
    source = [str(package / name) for name in PACKAGES]
    code = _CHILD.format(path=[str(package.parent), *sys.path], data=str(data), source=source)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    with tempfile.TemporaryFile() as told:
        child = subprocess.Popen(  # noqa: S603 - this interpreter, our own code
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stderr=told, env=environment
        )
        try:
            _feed(child, cases)
        except BaseException:
            child.kill()
            raise
        finally:
            ended = child.wait()
        told.seek(0)
        last = (told.read().decode(errors="replace").strip().splitlines() or ["it says nothing"])[-1]
    if ended:
        raise LinesError(f"the measured process ended with {ended}: {last}")


def _feed(child: subprocess.Popen[bytes], cases: Iterable[Case]) -> None:
    """Send the cases; a child that ended is no error here, as its exit code says more."""
    if child.stdin is None:
        raise LinesError("the measured process has no pipe")
    with suppress(BrokenPipeError):
        for case in cases:
            pickle.dump(case, child.stdin)
        child.stdin.close()


def run_pickled(stream: Any) -> None:
    """Run the cases that a stream of pickles has; the other end is this program."""
    from emufuzz.report.replay import Replayer  # noqa: PLC0415 - imported while measuring

    replayer = Replayer()
    while True:
        try:
            case = pickle.load(stream)  # noqa: S301 - our own process wrote it
        except EOFError:
            return
        replayer.run_subject(case)
