"""Cases of corpus/regressions/judged were findings without an explanation once; every oracle is asked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from emufuzz.case.errors import UnsupportedCaseError
from emufuzz.case.json import case_from_json
from emufuzz.fuzz.panel import Panel
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.compare import FINDING
from emufuzz.oracle.registry import ORACLES, open_oracle
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

JUDGED = Path(__file__).parents[2] / "corpus" / "regressions" / "judged"
SUBJECTS = {"emulator": lambda: FlatSubject(events=False), "kvm": KvmSubject}
CASES = [
    pytest.param(path.stem, case_from_json(line), id=f"{path.stem}-{number}")
    for path in sorted(JUDGED.glob("*.jsonl"))
    for number, line in enumerate(path.read_bytes().splitlines(), 1)
]


@pytest.fixture(scope="module")
def panel() -> Iterator[Panel]:
    others = []
    for name in list(ORACLES)[1:]:
        try:
            others.append(open_oracle(name))
        except OracleUnavailableError:
            assert name in {"native", "bochs"}  # the others need nothing
    opened = Panel(open_oracle("unicorn"), others)
    yield opened
    opened.close()
    opened.first.close()


def test_there_are_cases_of_every_subject():
    assert {name for name, _ in (param.values for param in CASES)} == set(SUBJECTS)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_it_is_explained(panel, name, case):
    (ours,) = SUBJECTS[name]().run([case])
    ours.gpr = tuple(ours.gpr)
    try:
        panel.first.check(case)
        (answer,) = panel.first.run([case])
    except UnsupportedCaseError:
        answer = None
    ruling, _ = panel.judge(case, ours, answer)
    assert ruling.kind != FINDING, ruling
