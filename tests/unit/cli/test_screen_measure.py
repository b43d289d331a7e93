"""What is measured over time, and what reasons say of themselves."""

from __future__ import annotations

import pytest

from emufuzz.cli.screen.measure import WINDOW, Growth, Rate, Restarts
from emufuzz.cli.screen.skips import (
    BEYOND,
    BROKEN,
    GAP,
    NO_EXIT,
    QUIRK,
    REFUSED,
    Health,
    health_of,
    kind_of,
    skips_of,
)
from emufuzz.cli.screen.text import ASCII_BARS, mebibytes, percent, plural, sparkline
from emufuzz.fuzz.tasks import WorkerState
from emufuzz.oracle.quirks import QUIRKS
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.verdict import NOBODY
from emufuzz.report.plain import duration, span


def test_the_rate_is_that_of_the_window():
    rate = Rate()
    assert rate.per_second() == 0
    rate.add(0.0, 0)
    assert rate.per_second() == 0
    rate.add(10.0, 1000)
    assert rate.per_second() == 100
    rate.add(WINDOW + 10.0, 1300)
    assert rate.per_second() == 10
    rate.add(2 * WINDOW + 20.0, 1300)
    assert rate.per_second() == 0  # all earlier samples are out of the window


def test_a_rate_keeps_few_samples():
    rate = Rate()
    for tick in range(100_000):
        rate.add(tick / 1000, tick)
    assert len(rate._samples) <= WINDOW * 4 + 1
    assert rate.per_second() == pytest.approx(1000)


def test_growth_knows_when_it_last_grew():
    growth = Growth([(30.0, 5), (60.0, 7), (90.0, 7)])
    assert (growth.value, growth.at) == (7, 60.0)
    growth.add(100.0, 7)
    assert growth.at == 60.0
    growth.add(110.0, 8)
    assert (growth.value, growth.at) == (8, 110.0)
    assert Growth().at is None


def test_growth_in_columns_is_by_time():
    growth = Growth([(0.0, 0), (10.0, 10), (90.0, 20), (100.0, 30)])
    assert growth.columns(10) == [10, 10, 10, 10, 10, 10, 10, 10, 20, 30]
    assert growth.columns(1) == [30]
    assert growth.columns(0) == []
    assert Growth().columns(5) == []
    assert Growth([(5.0, 3)]).columns(3) == [3, 3, 3]


def test_growth_stays_small_and_keeps_its_shape():
    growth = Growth((float(i), i) for i in range(1_000_000))
    assert len(growth._points) <= 512
    columns = growth.columns(10)
    assert columns == sorted(columns)
    for i, value in enumerate(columns, 1):
        assert value == pytest.approx(i * 100_000, abs=5000)
    assert growth.at == 999_999


def test_times_that_a_killed_run_did_not_record_do_no_harm():
    growth = Growth([(30.0, 5), (60.0, 7)])
    growth.add(45.0, 7)
    growth.add(50.0, 9)
    assert growth.at == 50.0
    assert growth.columns(4)[-1] == 9


def test_restarts_are_counted_by_place():
    def workers(*names):
        return [WorkerState(name, "idle") for name in names]

    restarts = Restarts()
    restarts.see(workers("1", "2"))
    restarts.see(workers("1", "2"))
    assert restarts.counts == [0, 0]
    restarts.see(workers("1", "3"))
    restarts.see(workers("4", "5"))
    assert restarts.counts == [1, 2]
    restarts.see(workers("4", "5", "6"))
    assert restarts.counts == [1, 2, 0]


ORACLES = ("unicorn", "rules", "cmd:./mine")


@pytest.mark.parametrize(
    ("reason", "kind", "oracle"),
    [
        ("kvm-quirk-21-enter", QUIRK, ""),
        ("kvm-quirk-21-enter+unicorn-segment-limit", QUIRK, ""),
        ("unicorn-segment-limit", GAP, "unicorn"),
        ("unicorn-segment-limit+unicorn-alignment", GAP, "unicorn"),
        ("rules-undetermined", GAP, "rules"),
        ("another-gap", GAP, ""),
        ("unicorn: phys: beyond it", BEYOND, "unicorn"),
        ("unicorn-crash", BROKEN, "unicorn"),
        ("cmd:incdec-hang", BROKEN, ""),
        (f"{NOBODY}: unicorn-segment-limit", BEYOND, ""),
        ("subject-unhandleable: not implemented by KVM", REFUSED, ""),
        ("no exit: the guest gets its own #GP and no exit happens", NO_EXIT, ""),
    ],
)
def test_reasons_say_of_what_kind_they_are(reason, kind, oracle):
    assert kind_of(reason, ORACLES) == (kind, oracle)


def test_every_gap_and_quirk_is_recognised_by_its_id():
    oracle = UnicornOracle()
    ids = {gap.id for gap in oracle.ledger}
    oracle.close()
    assert ids
    assert {kind_of(gap, ("unicorn",)) for gap in ids} == {(GAP, "unicorn")}
    assert {kind_of(quirk.id, ("unicorn",)) for quirk in QUIRKS} == {(QUIRK, "")}


def test_skips_are_ordered_by_their_cases():
    skips = skips_of({"b": 1, "a": 1, "kvm-x": 7}, ())
    assert [(skip.reason, skip.cases) for skip in skips] == [("kvm-x", 7), ("a", 1), ("b", 1)]


def test_health_says_no_more_than_the_reasons_do():
    skips = skips_of({"unicorn-x": 3, "unicorn: y": 2, "unicorn-hang": 1, "kvm-z": 9}, ORACLES)
    health = health_of(ORACLES, {"unicorn": "2.1.4", "rules": "187"}, skips, 50)
    assert health == (
        Health("unicorn", "2.1.4", None, 3, 2, 1),
        Health("rules", "187", None, 0, 0, 0),
        Health("cmd:./mine", "", None, None, None, None),
    )
    [alone] = health_of(("unicorn",), {}, skips_of({}, ("unicorn",)), 50)
    assert alone == Health("unicorn", "", 50, 0, 0, 0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00:00"), (59.9, "0:00:59"), (3661, "1:01:01"), (86400 * 3 + 61, "3 d 0:01:01"), (-5, "0:00:00")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_short_spans_have_tenths():
    assert [span(seconds) for seconds in (0, 1.26, 59.94, 60, 3661.5)] == [
        "0.0 s", "1.3 s", "59.9 s", "0:01:00", "1:01:01",
    ]  # fmt: skip


def test_texts():
    assert percent(1, 3) == "33.3 %"
    assert percent(0, 0) == "-"
    assert mebibytes(100 << 20) == "100 MiB"
    assert mebibytes(0) == "-"
    assert plural(1, "run") == "1 run"
    assert plural(1200, "run") == "1,200 runs"


def test_sparklines():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 50, 100], ASCII_BARS) == "_:#"
    assert sparkline([4, 4]) == "▁▁"
    assert sparkline([]) == ""
