"""The sample programs of docs/command.md do what the port does."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emufuzz.case.build import build_case
from emufuzz.oracle.command import CommandOracle
from emufuzz.oracle.compare import AGREE, judge
from emufuzz.subject.command import CommandSubject
from emufuzz.subject.flat import FlatSubject

SAMPLES = Path(__file__).parents[3] / "docs" / "samples"
COMPILER = shutil.which("cc")
VALUES = (0, 1, 0xF, 0x10, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFF00000000)


def _cases():
    return [
        build_case(
            "prot64", bytes((0xFF, modrm)), rax=value, rcx=value, rdi=value, flags=flags, id=f"{modrm}"
        )
        for modrm in (0xC0, 0xC1, 0xC7, 0xC8, 0xC9, 0xCF)
        for value in VALUES
        for flags in (0, 0x8D5)
    ]


@pytest.fixture(params=["py", "c"])
def command(request, tmp_path):
    if request.param == "py":
        return f"{sys.executable} {SAMPLES / 'incdec.py'}"
    if COMPILER is None:
        pytest.skip("no C compiler `cc` on this machine")
    program = tmp_path / "incdec"
    subprocess.run([COMPILER, "-Wall", "-Werror", "-o", program, SAMPLES / "incdec.c"], check=True)
    return str(program)


def test_as_an_oracle_they_agree_with_the_port(command):
    oracle = CommandOracle(command)
    cases = _cases()
    for case, ours, theirs in zip(cases, FlatSubject().run(cases), oracle.run(cases), strict=True):
        assert judge(case, ours, theirs, oracle).kind == AGREE
    oracle.close()


def test_what_they_do_not_know_they_refuse(command):
    subject = CommandSubject(command)
    (outcome,) = subject.run([build_case("prot64", b"\x90")])
    subject.close()
    assert (outcome.rc, outcome.reason) == (
        "unhandleable",
        "unsupported: neither INC nor DEC of a 32-bit register",
    )


def test_they_are_short():
    assert all(len(path.read_text().splitlines()) < 150 for path in SAMPLES.iterdir())
