"""A headless Chromium that has no network."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

import pytest

#: Without the extra `browser` there is nothing to collect; `pytest -m browser` then says that no test ran.
collect_ignore = [] if find_spec("selenium") else ["test_coverage_page.py"]

#: As root there is no sandbox; the rest keeps Chromium from looking for hosts of its own.
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND",
)  # fmt: skip


@pytest.fixture(scope="session")
def chromium(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.binary_location = shutil.which("chromium")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    driver.set_window_size(1400, 1000)
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium):
    """The browser, which must have nothing to complain about afterwards."""
    chromium.get_log("browser")
    yield chromium
    assert chromium.get_log("browser") == []
