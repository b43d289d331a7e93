"""The live screen's picture: what it says, and that it fits any terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from emufuzz.cli.screen.frame import frame
from emufuzz.cli.screen.measure import Growth
from emufuzz.cli.screen.skips import health_of, skips_of
from emufuzz.cli.screen.view import Subject, View, WorkerRow
from emufuzz.fuzz.campaign import Limits
from emufuzz.fuzz.config import CampaignConfig

SKIPPED = {
    "unicorn-segment-limit": 40,
    "kvm-quirk-21-enter": 30,
    "subject-unhandleable: not implemented by KVM": 20,
    "unicorn: phys is beyond it": 6,
    "unicorn-crash": 4,
}


def picture(view, width=80, height=24, latest=(), **options):
    """The picture as text, as a terminal of that size would get it."""
    return "\n".join(line.plain for line in frame(view, latest, width, height, **options))


def a_view(**changes):
    config = CampaignConfig(seed=7)
    skips = skips_of(SKIPPED, config.oracles)
    growth = Growth([(0.0, 0), (50.0, 100), (100.0, 150)])
    values = {
        "subject": Subject("campaign", config, {"unicorn": "2.1.4"}, Limits(10_000)),
        "elapsed": 100.0,
        "total_elapsed": 3700.0,
        "cases": 1000,
        "earlier_cases": 0,
        "rate_now": 12.0,
        "rate": 10.0,
        "left": 754.0,
        "compared": 900,
        "agreed": 897,
        "skips": skips,
        "oracles": health_of(config.oracles, {"unicorn": "2.1.4"}, skips, 900),
        "covered": 150,
        "coverable": 3000,
        "coverage": growth,
        "since_coverage": 61.0,
        "since_finding": None,
        "buckets": 3,
        "new": 2,
        "verdicts": {"alone": 2, "failed": 1},
        "to_shrink": 1,
        "workers": (
            WorkerRow("4711", "batch", 12, 640, "oracle", 100 << 20, 0),
            WorkerRow("4712", "shrink", None, 33, None, 0, 2),
        ),
        "restarts": 2,
    }
    return View(**(values | changes))


SIZES = [
    (80, 24),
    (80, 25),
    (79, 24),
    (72, 20),
    (71, 40),
    (132, 43),
    (200, 60),
    (40, 12),
    (20, 5),
    (10, 2),
    (5, 1),
]


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize("ascii_only", [False, True])
def test_the_picture_fits_the_terminal(width, height, ascii_only):
    latest = tuple(f"0:00:{i:02}  finding  something {'long ' * 40}" for i in range(50))
    lines = frame(a_view(), latest, width, height, ascii_only=ascii_only)
    assert len(lines) <= height
    assert {line.cell_len for line in lines} == {width}
    text = "\n".join(line.plain for line in lines)
    assert not ascii_only or text.isascii()
    assert text.startswith("emufu")


@pytest.mark.parametrize("size", [(80, 24), (132, 30), (71, 60)])
def test_every_section_is_there(size):
    text = picture(a_view(), *size)
    for title in ("run", "cases", "coverage: leaves x modes", "findings", "what happened last"):
        assert f"── {title} ─" in text
    assert "── skipped: 100 (10.0 %), 5 reasons ─" in text
    assert "── oracles: 900 compared (90.0 %) ─" in text
    assert "── workers: 2, 2 restarted ─" in text


def test_numbers_of_the_campaign_at_80_by_24():
    text = picture(a_view())
    for label, value in (
        ("run time", "0:01:40 "),
        ("of all runs", "1:01:40 "),
        ("left", "0:12:34 "),
        ("to shrink", "1 finding "),
        ("done", "1,000 (10.0 %) "),
        ("budget", "10,000 "),
        ("throughput", "12/s, mean 10/s"),
        ("agreed", "897 (89.7 %)"),
        ("covered", "150 of 3,000 (5.0 %)"),
        ("last new", "0:01:01 ago"),
        ("last new", "none yet"),
        ("buckets", "3 in all, 2 new "),
        ("verdicts", "2 alone, 1 failed"),
    ):
        assert f" {label:<13}{value}" in text
    assert text.splitlines()[0].rstrip() == "emufuzz  emulator against unicorn  seed 7  campaign"


def test_growth_is_a_line_of_columns():
    row = next(line for line in picture(a_view()).splitlines() if line.startswith(" growth"))
    columns = row[14:39].strip()
    assert set(columns) <= set("▁▂▃▄▅▆▇█")
    assert list(columns) == sorted(columns)
    assert (columns[0], columns[-1]) == ("▁", "█")


def test_oracles_show_version_share_and_what_they_could_not_do():
    row = next(line for line in picture(a_view()).splitlines() if line.startswith(" unicorn 2.1.4"))
    assert row.split() == ["unicorn", "2.1.4", "90.0", "%", "40", "6", "4"]


def test_one_of_several_oracles_has_no_share_of_its_own():
    config = CampaignConfig(oracles=("unicorn", "rules", "cmd:./mine"))
    oracles = health_of(config.oracles, {}, skips_of(SKIPPED, config.oracles), 900)
    text = picture(a_view(oracles=oracles), height=30)
    rows = [line.split() for line in text.splitlines()]
    assert ["unicorn", "-", "40", "6", "4"] in rows
    assert ["rules", "-", "0", "0", "0"] in rows
    assert ["cmd:./mine", "-", "-", "-", "-"] in rows


def test_workers_show_what_is_in_work():
    rows = [line.split() for line in picture(a_view()).splitlines()]
    assert ["4711", "batch", "12", "640", "oracle", "100", "MiB", "0"] in rows
    assert ["4712", "shrink", "-", "33", "-", "-", "2"] in rows


def test_more_lines_show_more_rows():
    counts = {f"kvm-quirk-{i}": 100 - i for i in range(40)}
    view = a_view(skips=skips_of(counts, ("unicorn",)))
    shown = [picture(view, 80, height).count("kvm-quirk-") for height in (24, 30, 40, 80)]
    assert shown == sorted(set(shown))
    assert shown[0] >= 2
    assert shown[-1] == 40


def test_what_happened_last_is_on_top():
    text = picture(a_view(), latest=("0:00:01  finding  first", "0:00:02  shrunk   second"))
    assert text.index("second") < text.index("first")


def test_wide_terminals_have_workers_beside_oracles():
    lines = picture(a_view(), 160, 30).splitlines()
    assert any("── oracles" in line and "── workers" in line for line in lines)
    assert any("── skipped" in line and "── what happened last" in line for line in lines)


def test_a_campaign_before_its_first_case():
    empty = a_view(
        cases=0, compared=0, agreed=0, skips=(), oracles=(), covered=0, coverage=Growth(), buckets=0, new=0
    )
    text = picture(empty, latest=())
    assert "0 (-)" in text
    assert "nothing to report" in text


def test_a_campaign_without_limits_says_how_to_end_it():
    view = a_view(subject=Subject("c", CampaignConfig(), {}, Limits()), left=None)
    assert f" {'left':<13}until Ctrl-C" in picture(view)


def test_names_from_files_cannot_command_the_terminal():
    evil = "kvm-\x1b[2J\x07\n\r\u202e"
    view = a_view(
        skips=skips_of({evil: 5}, ("unicorn",)),
        subject=Subject(f"/{evil}", CampaignConfig(), {}, Limits()),
        workers=(WorkerRow(evil, "idle", None, None, None, 0, 0),),
    )
    text = picture(view, latest=(evil,))
    assert r"kvm-\x1b[2J" in text
    assert not any(not letter.isprintable() for letter in text.replace("\n", ""))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_a_terminal_gets_only_what_it_can_show(encoding):
    from emufuzz.cli.screen.outputs import _Picture

    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict")
    console = Console(file=stream, width=80, height=24, force_terminal=True, color_system=None)
    console.print(_Picture(a_view(), ()), end="")
    stream.flush()
    assert ("─".encode() in raw.getvalue()) == (encoding == "utf-8")
    assert len(raw.getvalue().decode().splitlines()) == len(picture(a_view()).splitlines())
