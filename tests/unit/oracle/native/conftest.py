from __future__ import annotations

from collections.abc import Iterator

import pytest

from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.native import NativeOracle


@pytest.fixture(scope="session")
def native() -> Iterator[NativeOracle]:
    try:
        opened = NativeOracle()
    except OracleUnavailableError as reason:
        pytest.skip(str(reason))
    yield opened
    opened.close()


@pytest.fixture
def impatient() -> Iterator[NativeOracle]:
    """An oracle of the test's own, which soon takes a case for hung."""
    try:
        opened = NativeOracle(patience=0.3)
    except OracleUnavailableError as reason:
        pytest.skip(str(reason))
    yield opened
    opened.close()
