"""The port and Unicorn agree on ordinary instructions, in every mode and at every CPL."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from emufuzz.arch.rflags import X86_EFLAGS_IOPL
from emufuzz.case.build import build_case, cpls_of
from emufuzz.case.model import Case
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

MODES = ("real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64")
#: Register forms whose flags are all defined, the same bytes in every mode.
REGISTER_FORMS = (
    "00d8", "01d8", "10d9", "11d1", "18c2", "29d8", "38d8", "39ca", "84c3", "f7d3", "f6d9",
    "fec0", "fec9", "86c1", "87d1", "88e5", "89d8", "b07f", "0fb6c1", "0fbfd1", "0fa3d8",
    "0fabd9", "0fc0c1", "0fc1d9", "98", "99", "9e", "9f", "f5", "f8", "f9", "fc", "fd", "93",
    "d0c0", "d1c8", "0f94c0", "0f4cc1", "7302", "eb05", "50", "5b", "9c", "c8100000",
)  # fmt: skip
STATES = 6


@pytest.fixture(scope="module")
def oracle() -> Iterator[UnicornOracle]:
    opened = UnicornOracle()
    yield opened
    opened.close()


def _cases(mode: str, cpl: int) -> list[Case]:
    generator = random.Random(f"{mode} {cpl}")
    width = 64 if mode == "prot64" else 32
    # KVM deviation: PUSHF in virtual-8086 mode ignores IOPL, so IOPL is 3 here.
    base = build_case(mode, b"", cpl=cpl, flags=X86_EFLAGS_IOPL)
    cases = []
    for code in REGISTER_FORMS:
        for _ in range(STATES):
            gpr = [generator.getrandbits(width) for _ in base.gpr]
            gpr[4] = base.gpr[4]
            if mode != "prot64":
                gpr[8:] = [0] * 8
            flags = base.rflags ^ generator.getrandbits(12) & 0x8D5
            cases.append(_replace(base, code=bytes.fromhex(code), gpr=tuple(gpr), rflags=flags))
    return cases


def _replace(case: Case, **changes: object) -> Case:
    return Case(**{**{name: getattr(case, name) for name in case.__struct_fields__}, **changes})  # type: ignore[arg-type]  # fields of several types


@pytest.mark.parametrize(("mode", "cpl"), [(mode, cpl) for mode in MODES for cpl in cpls_of(mode)])
def test_register_forms_agree(oracle, mode, cpl):
    cases = _cases(mode, cpl)
    ported = FlatSubject().run(cases)
    judged = oracle.run(cases)
    for case, ours, theirs in zip(cases, ported, judged, strict=True):
        place = f"{case.code.hex()} {case.gpr} {case.rflags:#x}"
        assert ours.exception == theirs.exception, place
        assert list(ours.gpr) == list(theirs.gpr), place
        assert (ours.rip, ours.rflags) == (theirs.rip, theirs.rflags), place
        assert ours.pages == theirs.pages, place
