from __future__ import annotations

import pytest

from emufuzz.oracle.base import OracleUnavailableError
from emufuzz.oracle.bochs import BochsOracle


@pytest.fixture(scope="session")
def bochs():
    try:
        opened = BochsOracle()
    except OracleUnavailableError as error:
        if "missing" not in str(error):
            raise
        pytest.skip(str(error))
    yield opened
    opened.close()
