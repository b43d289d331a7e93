"""The port and Unicorn agree on control, debug and model-specific registers and on system calls.

Random values near the ones that matter; what Unicorn does not check must be in its ledger, and most
cases must really be compared.
"""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest

from emufuzz.case.build import build_case, cpls_of
from emufuzz.oracle.compare import AGREE, FINDING, judge, refusal
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

MODES = ("real", "vm86", "prot16", "prot32", "compat16", "compat32", "prot64")
MSRS = (
    0x174, 0x175, 0x176, 0x277, 0xC0000080, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084,
    0xC0000100, 0xC0000101, 0xC0000102, 0xC0000103,
)  # fmt: skip
ADDRESSES = (0, 0x1000, 0x7FFFFFFFF000, 0x800000000000, 0xFFFF800000000000, (1 << 64) - 1)
CR0 = (0x11, 0x31, 0x80000011, 0x80010033, 0x60000010, 0x20000011, 0x10, 0xE005003F, 0x80000010)
CR4 = (0, 0x20, 0x6A0, 0x406A0, 0x10, 0x200, 0x2000, 0x700020, 0x1020)
DRS = (0, 0x400, 0xFFFF0FF0, 0xFF00, 0xD000, 0x1E80F, 0x1F, 1 << 32)
#: Instruction -> the values between which its operands are chosen: (RAX, RCX, RDX).
FORMS = {
    "0f20c0": ((0,), (0,), (0,)),
    "0f20d0": ((0,), (0,), (0,)),
    "0f20d8": ((0,), (0,), (0,)),
    "0f20e0": ((0,), (0,), (0,)),
    "0f20c8": ((0,), (0,), (0,)),
    "0f22c0": (CR0, (0,), (0,)),
    "0f22d0": (ADDRESSES, (0,), (0,)),
    "0f22d8": (ADDRESSES, (0,), (0,)),
    "0f22e0": (CR4, (0,), (0,)),
    "0f22e8": (CR4, (0,), (0,)),
    "0f21c0": ((0,), (0,), (0,)),
    "0f21e0": ((0,), (0,), (0,)),
    "0f21f8": ((0,), (0,), (0,)),
    "0f23c0": (ADDRESSES, (0,), (0,)),
    "0f23e0": (DRS, (0,), (0,)),
    "0f23f0": (DRS, (0,), (0,)),
    "0f23f8": (DRS, (0,), (0,)),
    "0f06": ((0,), (0,), (0,)),
    "0f01e0": ((0x12345678,), (0,), (0,)),
    "0f01f0": (CR0, (0,), (0,)),
    "0f01d1": ((0, 1, 2, 3, 5, 7), (0, 0, 1), (0, 0, 1)),
    "0f32": ((0,), MSRS, (0,)),
    "0f30": ((0, 1, 0x10, 0x501, 0xD01, 0x00070406, 0x80000000), MSRS, (0, 0, 0x7FFF, 0x8000, 0xFFFF8000)),
    "0f34": ((0,), (0,), (0,)),
    "0f35": ((0,), ADDRESSES, ADDRESSES),
    "480f35": ((0,), ADDRESSES, ADDRESSES),
    "0f31": ((0,), (0,), (0,)),
    "e460": ((0,), (0,), (0,)),
    "66ed": ((0x11111111,), (0,), (0x60,)),
    "ee": ((0x11,), (0,), (0x60,)),
    "ce": ((0,), (0,), (0,)),
    "dbe3": ((0,), (0,), (0,)),
}
#: They are #UD, or what they end in is a gap.
NEVER_COMPLETED = {"0f20c8", "0f22e8", "0f31", "0f34", "480f35"}


@pytest.fixture(scope="module")
def oracle():
    opened = UnicornOracle()
    yield opened
    opened.close()


def _system(rng, system):
    """The same with MSRs, debug registers and random bits that control instructions look at."""
    msr = [
        (index, rng.choice((0, 8, 0x1000)))
        for index in MSRS
        if index not in {0xC0000080, 0xC0000100, 0xC0000101}
    ]
    return msgspec.structs.replace(
        system,
        msr=tuple(msr),
        cr0=system.cr0 ^ rng.choice((0, 2, 8, 0x20)),
        cr2=rng.choice(ADDRESSES),
        cr4=system.cr4 ^ rng.choice((0, 4, 8, 1 << 18)),
        efer=system.efer ^ rng.choice((0, 1, 0x800)),
        xcr0=rng.choice((1, 3)),
        dr=(1, 2, 3, 4, 0, 0, 0xFFFF0FF0, rng.choice((0x400, 0x400, 0x2400))),
    )


def _cases(rng, mode, cpl, code):
    base = build_case(mode, bytes.fromhex(code) + b"\xf4", cpl=cpl)
    for _ in range(12):
        gpr = list(base.gpr)
        for number, values in zip((0, 1, 2), FORMS[code], strict=True):
            gpr[number] = rng.choice(values) & ((1 << 64) - 1 if mode == "prot64" else (1 << 32) - 1)
        flags = base.rflags ^ rng.choice((0, 0x3000, 0x800))
        yield msgspec.structs.replace(base, gpr=tuple(gpr), rflags=flags, system=_system(rng, base.system))


@pytest.mark.parametrize("code", FORMS)
def test_control_instructions_agree(oracle, code):
    rng, subject, seen = random.Random(code), FlatSubject(), Counter()
    for mode in MODES:
        if code.startswith("48") and mode != "prot64":
            continue
        for cpl in cpls_of(mode):
            for case in _cases(rng, mode, cpl, code):
                (ours,), (theirs,) = subject.run([case]), oracle.run([case])
                if refusal(ours):
                    continue
                ours.gpr = tuple(ours.gpr)
                verdict = judge(case, ours, theirs, oracle)
                where = (mode, cpl, case.gpr[:4], case.system, verdict.differences)
                assert verdict.kind != FINDING, where
                seen[verdict.kind] += 1
                seen["completed"] += verdict.kind == AGREE and ours.exception is None
    assert seen[AGREE] >= 12
    assert (seen["completed"] > 0) != (code in NEVER_COMPLETED)
