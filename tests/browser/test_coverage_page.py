"""The coverage page as a user has it: switches, keys, links, widths, colours, and how fast it opens."""

from __future__ import annotations

import itertools
import sqlite3
from contextlib import closing

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.select import Select
from support.coverage import PATHS, make_campaign

from emufuzz.arch.exceptions import EXCEPTION_NAMES
from emufuzz.arch.leaves import LEAVES, leaf_rows
from emufuzz.arch.modes import MODES
from emufuzz.fuzz.cells import Cell
from emufuzz.fuzz.store import StoreView
from emufuzz.report.coverage.html import page
from emufuzz.report.coverage.model import Coverage, Entry, coverage_of

pytestmark = pytest.mark.browser

MEASURES = ("cases", "outcomes", "exceptions", "findings")


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    directory = tmp_path_factory.mktemp("campaign") / "kvm"
    make_campaign(directory, subject="kvm", size=600)
    return directory


@pytest.fixture(scope="module")
def address(campaign):
    with closing(StoreView(campaign)) as view:
        text = page(coverage_of(view))
    file = campaign.with_name("page.html")
    file.write_text(text)
    return file.as_uri()


@pytest.fixture(scope="module")
def cells(campaign):
    with closing(sqlite3.connect(campaign / "campaign.sqlite")) as db:
        return db.execute("SELECT leaf, mode, cpl, outcome, path, cases, findings FROM cells").fetchall()


def choose(browser, **switches):
    for name, text in switches.items():
        Select(browser.find_element(By.ID, name)).select_by_visible_text(text)


def shown(browser, what):
    """What the maps, or the groups below them, show: name -> number."""
    script = (
        f"return [...document.querySelectorAll('[data-{what}]')].map(b => [b.dataset.{what}, b.dataset.n])"
    )
    return {name: int(n) for name, n in browser.execute_script(script)}


def expected(rows, measure):
    """A measure of some cells, from the rows of the store."""
    names = {row[3] for row in rows}
    return {
        "cases": sum(row[5] for row in rows),
        "findings": sum(row[6] for row in rows),
        "outcomes": len(names),
        "exceptions": sum(name.startswith(("#", "vector")) or name == "NMI" for name in names),
    }[measure]


def code_of(row):
    return {"1byte": "", "0f": "0F ", "0f38": "0F 38 "}[row.map] + f"{row.opcode:02X}"


LABELS = {
    "outcomes": "different outcomes",
    "exceptions": "different exceptions",
    "findings": "cases in findings",
}


@pytest.mark.parametrize("measure", MEASURES)
def test_every_number_under_every_switch_is_the_stores(browser, address, cells, measure):
    browser.get(address)
    choose(browser, measure=LABELS.get(measure, measure))
    for mode, path in itertools.product(("all", "real", "prot64", "compat32"), ("all", *PATHS)):
        choose(browser, mode=mode, path=path)
        chosen = [row for row in cells if mode in ("all", row[1]) and path in ("all", row[4])]
        by_leaf, by_code = {}, {}
        for row in chosen:
            by_leaf.setdefault(row[0], []).append(row)
            code = code_of(LEAVES[row[0]]) if row[0] in LEAVES else "other"
            by_code.setdefault(code, []).append(row)
        codes, leaves = shown(browser, "code"), shown(browser, "leaf")
        assert len(codes) == 3 * 256 + 1
        assert codes == {code: expected(by_code.get(code, []), measure) for code in codes}
        assert leaves == {leaf: expected(by_leaf.get(leaf, []), measure) for leaf in leaves}
        state = browser.find_element(By.ID, "state").text
        assert state.endswith(f": {expected(chosen, measure):,}")


def test_cpl_is_a_switch_too(browser, address, cells):
    browser.get(address)
    choose(browser, cpl="3")
    assert sum(shown(browser, "code").values()) == sum(row[5] for row in cells if row[2] == 3) > 0


def test_groups_are_unfolded(browser, address):
    browser.get(address)
    slots = {}
    for row in leaf_rows():
        slots.setdefault((row.map, row.opcode), []).append(row.leaf)
    unfolded = {leaf for leaves in slots.values() if len(leaves) > 1 for leaf in leaves}
    assert set(shown(browser, "leaf")) == unfolded


def test_an_opcode_shows_its_cells_and_cases(browser, address, cells):
    browser.get(address)
    leaf = next(row[0] for row in cells if row[0] in LEAVES and "/" not in row[0] and "." not in row[0])
    button = browser.find_element(By.ID, f"slot-{LEAVES[leaf].map}-{LEAVES[leaf].opcode:02x}")
    assert LEAVES[leaf].mnemonic in button.get_attribute("aria-label")
    button.click()
    rows = browser.find_elements(By.CSS_SELECTOR, "#detail-cells tbody tr")
    mine = [row for row in cells if row[0] == leaf]
    assert len(rows) == len(mine)
    counts = sorted(int(row.find_elements(By.TAG_NAME, "td")[-2].text.replace(",", "")) for row in rows)
    assert counts == sorted(row[5] for row in mine)
    examples = browser.find_elements(By.CSS_SELECTOR, "#detail-examples tbody tr")
    assert examples
    assert "emufuzz coverage CAMPAIGN --case" in browser.find_element(By.ID, "detail").text
    assert browser.find_elements(By.CSS_SELECTOR, "#detail-oracles tbody tr")


def test_arrow_keys_move_and_enter_chooses(browser, address):
    browser.get(address)
    browser.execute_script("document.getElementById('slot-1byte-00').focus()")
    for key, to in (
        (Keys.ARROW_RIGHT, "01"), (Keys.ARROW_DOWN, "11"), (Keys.END, "1f"), (Keys.ARROW_UP, "0f"),
        (Keys.ARROW_UP, "0f"), (Keys.HOME, "00"), (Keys.ARROW_LEFT, "00"),
    ):  # fmt: skip
        browser.switch_to.active_element.send_keys(key)
        assert browser.switch_to.active_element.get_attribute("id") == f"slot-1byte-{to}"
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert browser.find_element(By.ID, "detail-title").text == "00 add"


def test_everything_can_be_reached_by_tab(browser, address):
    browser.get(address)
    script = "return [...document.querySelectorAll('.map')].map(m => m.querySelectorAll(arguments[0]).length)"
    stops = browser.execute_script(script, 'button[tabindex="0"]')
    assert stops == [1, 1, 1]


def test_links_lead_to_what_is_there(browser, address):
    browser.get(address)
    links = [link.get_attribute("href") for link in browser.find_elements(By.TAG_NAME, "a")]
    assert len(links) > 40
    assert {link.partition("#")[0] for link in links} == {address}
    names = {link.partition("#")[2] for link in links}
    missing = browser.execute_script(
        "return arguments[0].filter(n => !document.getElementById(n))", sorted(names)
    )
    assert missing == []


def test_switches_are_kept_in_the_address(browser, address):
    browser.get(address)
    choose(browser, measure="different outcomes", mode="prot64")
    numbers = shown(browser, "code")
    kept = browser.current_url
    browser.get("about:blank")
    browser.get(kept)
    assert shown(browser, "code") == numbers
    assert Select(browser.find_element(By.ID, "mode")).first_selected_option.text == "prot64"


@pytest.mark.parametrize("width", [360, 768, 1400])
def test_nothing_is_wider_than_the_screen(browser, address, width):
    device = {"width": width, "height": 740, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", device)
    try:
        browser.get(address)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def luminance(color):
    parts = [int(part) / 255 for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_can_be_read_on_every_shade(browser, address, scheme):
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(address)
    shades = browser.execute_script(
        "const r = {}; for (const b of document.querySelectorAll('.map .cell, .key .cell')) {"
        "const s = getComputedStyle(b); r[b.className.match(/h\\d/)[0]] = [s.color, s.backgroundColor]; }"
        "return r"
    )
    assert len(shades) >= 5
    for color, background in shades.values():
        light, dark = sorted((luminance(color), luminance(background)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG 2.1, 1.4.3
    body = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (luminance(body) > 0.5) == (scheme == "light")


def test_a_campaign_of_ten_million_cases_opens_in_two_seconds(browser, tmp_path):
    """More cells than such a campaign reaches: every leaf in every mode, at two CPLs, with six outcomes."""
    outcomes = ("ok", "unhandleable", *list(EXCEPTION_NAMES.values())[5:9])
    keys = itertools.product(LEAVES, MODES, (0, 3), outcomes, ("",))
    entries = {
        Cell(*key): Entry(96, 1, f"{i % 4883}:{i % 2048}", b"\x67\x64\x40\xc3\xf4")
        for i, key in enumerate(keys)
    }
    assert sum(entry.cases for entry in entries.values()) > 10_000_000
    file = tmp_path / "page.html"
    file.write_text(page(Coverage("ten million cases", entries=entries)))
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    browser.get(file.as_uri())
    metrics = browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]
    busy = next(metric["value"] for metric in metrics if metric["name"] == "TaskDuration")
    browser.execute_cdp_cmd("Performance.disable", {})
    assert browser.find_element(By.ID, "state").text.endswith(f": {96 * len(entries):,}")
    assert 0 < busy < 2  # seconds of processor time, so that a busy machine does not count
