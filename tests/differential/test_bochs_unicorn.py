"""Bochs against Unicorn, the host's processor and the port, on generated cases of all modes."""

from __future__ import annotations

from collections import Counter

import pytest
from support.oracle_pairs import assert_agreement

from emufuzz.arch.modes import MODES
from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.bochs import BochsOracle
from emufuzz.oracle.compare import AGREE, SKIPPED, judge, refusal
from emufuzz.oracle.native import NativeOracle
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

SIZE = 512


@pytest.fixture(scope="module")
def bochs():
    try:
        opened = BochsOracle()
    except OracleUnavailableError as error:
        if "missing" not in str(error):
            raise
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def unicorn():
    opened = UnicornOracle()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def native():
    try:
        opened = NativeOracle()
    except OracleUnavailableError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.mark.parametrize("mode", MODES)
def test_bochs_and_unicorn_agree(bochs, unicorn, mode):
    assert_agreement(bochs, unicorn, 1, 700, at_most=0.2, modes=(mode,))
    assert bochs.starts == 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40, 50))
def test_bochs_and_unicorn_agree_on_200000_cases(bochs, unicorn, seed):
    assert_agreement(bochs, unicorn, seed, 20_000, at_most=0.15)
    assert bochs.starts == 1


def test_bochs_and_the_processor_agree(bochs, native):
    assert_agreement(bochs, native, 2, 1500, at_most=0.2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(30, 40))
def test_bochs_and_the_processor_agree_on_200000_cases(bochs, native, seed):
    assert_agreement(bochs, native, seed, 20_000, at_most=0.15)


def test_bochs_judges_the_port(bochs):
    """Bochs finds nothing in the port but quirks, gaps and what KVM makes of STI."""
    subject, seen = FlatSubject(), Counter()
    for batch in range(4):
        cases = generate_batch(6, batch, SIZE, Options(states=1))
        for case, ours, theirs in zip(cases, subject.run(cases), bochs.run(cases), strict=True):
            if refusal(ours):
                continue
            verdict = judge(case, ours, theirs, bochs)
            seen[verdict.kind] += 1
            if verdict.kind not in {AGREE, SKIPPED}:
                seen[f"{ours.leaf} {[d.field for d in verdict.differences]}"] += 1
    assert seen[AGREE] > sum(seen.values()) * 0.9
