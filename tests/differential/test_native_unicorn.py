"""The host's processor and Unicorn agree on code at CPL 3, outside of both ledgers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.oracle_pairs import assert_agreement

from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.native import NativeOracle
from emufuzz.oracle.unicorn import UnicornOracle

IN_LEDGER = 1 / 6


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOracle]:
    try:
        opened = NativeOracle()
    except OracleUnavailableError as reason:
        pytest.skip(str(reason))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def unicorn() -> Iterator[UnicornOracle]:
    opened = UnicornOracle()
    yield opened
    opened.close()


def test_20000_cases_agree(native, unicorn):
    assert_agreement(native, unicorn, 1, 20_000, at_most=IN_LEDGER, states=4)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_1000000_cases_agree(native, unicorn, seed):
    assert_agreement(native, unicorn, seed, 50_000, at_most=IN_LEDGER, states=4)
