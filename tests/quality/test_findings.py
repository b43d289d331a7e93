"""Every defect in docs/findings.md is still there: its program prints what the document says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from emufuzz.oracle.unicorn.engine import UNICORN_VERSION
from emufuzz.oracle.unicorn.ledger import REASONS

DOCUMENT = Path(__file__).parents[2] / "docs" / "findings.md"
SECTION = re.compile(r"^## (\d+)\. (.+)$", re.MULTILINE)
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
#: Lines of a program that is still minimal.
LONGEST = 25


class Finding(NamedTuple):
    number: int
    title: str
    text: str

    @property
    def blocks(self):
        return BLOCK.findall(self.text)

    @property
    def gaps(self):
        (line,) = re.findall(r"^Ledger: (.+)$", self.text, re.MULTILINE)
        return re.findall(r"`(unicorn-[a-z0-9-]+)`", line)


def findings():
    _, *parts = SECTION.split(DOCUMENT.read_text())
    return [Finding(int(number), title, text) for number, title, text in zip(*[iter(parts)] * 3, strict=True)]


@pytest.mark.parametrize("finding", findings(), ids=lambda finding: str(finding.number))
def test_the_program_prints_what_the_document_says(finding, tmp_path):
    (_, program), (_, printed) = finding.blocks
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


@pytest.mark.parametrize("finding", findings(), ids=lambda finding: str(finding.number))
def test_a_finding_is_minimal_cited_and_in_the_ledger(finding):
    assert [language for language, _ in finding.blocks] == ["python", "text"]
    assert len(finding.blocks[0][1].splitlines()) <= LONGEST
    imported = re.findall(r"^(?:from|import) (\w+)", finding.blocks[0][1], re.MULTILINE)
    assert set(imported) <= {"unicorn", "os"}
    assert re.search(r"^Should: .*\((SDM|APM) Vol\.", finding.text, re.MULTILINE | re.DOTALL)
    assert set(finding.gaps) <= set(REASONS)


def test_findings_are_numbered_and_about_the_version_that_runs():
    numbers = [finding.number for finding in findings()]
    assert numbers == list(range(1, len(numbers) + 1))
    assert UNICORN_VERSION in DOCUMENT.read_text().splitlines()[0]
