"""Every defect in docs/findings-bochs.md is still there: its program prints what the document says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emufuzz.oracle.bochs.gaps import BOCHS_GAPS

DOCUMENT = Path(__file__).parents[4] / "docs" / "findings-bochs.md"
TEXT = DOCUMENT.read_text("utf-8")
PROGRAMS = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_the_program_prints_what_the_document_says(bochs, number):
    program, printed = PROGRAMS[number]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (0, printed), done.stderr


def test_every_section_has_a_program_and_every_gap_exists():
    assert len(PROGRAMS) == len(re.findall(r"^## \d", TEXT, re.MULTILINE))
    assert set(re.findall(r"`(bochs-[a-z0-9-]+)`", TEXT)) <= {gap.id for gap in BOCHS_GAPS}
