"""The page: every number in it is the store's, recomputed here from the file itself."""

from __future__ import annotations

import itertools
import json
import re
import sqlite3
from collections import Counter
from contextlib import closing
from html.parser import HTMLParser

import msgspec
import pytest
from support.coverage import make_campaign

from emufuzz.arch.leaves import LEAVES, leaf_rows
from emufuzz.fuzz.cells import Cell
from emufuzz.fuzz.schedule import BATCH_SIZE
from emufuzz.fuzz.store import StoreView
from emufuzz.report.coverage.html import page, page_data
from emufuzz.report.coverage.model import Coverage, Entry, coverage_of
from emufuzz.report.plain import span

WIDTH = 7


class Page(HTMLParser):
    """Texts of elements by id, rows of tables by id, ids, and links."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.rows, self.ids, self.links = {}, {}, [], []
        self._open, self._table, self._cell = [], None, None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag == "table":
            self._table = self.rows.setdefault(attrs.get("id"), [])
        if tag == "tr" and self._table is not None:
            self._table.append([])
        self._cell = attrs.get("id")
        if tag in ("td", "th") and self._table:
            self._table[-1].append("")
        self._open.append(tag)

    def handle_endtag(self, tag):
        if tag == "table":
            self._table = None
        self._cell = None

    def handle_data(self, data):
        if self._cell:
            self.texts[self._cell] = self.texts.get(self._cell, "") + data
        if self._table and self._table[-1] and data.strip():
            self._table[-1][-1] += data


@pytest.fixture(scope="module", params=["emulator", "kvm"])
def campaign(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("campaign") / request.param
    make_campaign(directory, subject=request.param, size=1024 if request.param == "emulator" else 600)
    return directory


@pytest.fixture(scope="module")
def coverage(campaign):
    with closing(StoreView(campaign)) as view:
        return coverage_of(view)


@pytest.fixture(scope="module")
def text(coverage):
    return page(coverage)


@pytest.fixture(scope="module")
def read(text):
    return Page(text)


@pytest.fixture(scope="module")
def data(text):
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    return json.loads(found)


@pytest.fixture(scope="module")
def rows(campaign):
    def query(statement):
        with closing(sqlite3.connect(campaign / "campaign.sqlite")) as db:
            return db.execute(statement).fetchall()

    return query


def embedded(data):
    cells = {}
    for at in range(0, len(data["cells"]), WIDTH):
        leaf, mode, cpl, outcome, path, cases, findings = data["cells"][at : at + WIDTH]
        key = (
            data["leaves"][leaf][0],
            data["modes"][mode],
            cpl,
            data["outcomes"][outcome][0],
            data["paths"][path],
        )
        assert key not in cells
        cells[key] = cases, findings
    return cells


def test_cells_are_those_of_the_store(data, rows):
    stored = {tuple(row[:5]): tuple(row[5:7]) for row in rows("SELECT * FROM cells")}
    assert embedded(data) == stored
    assert len(stored) > 300


def test_sums_are_those_of_the_store(read, rows):
    [(cases, cells, in_findings)] = rows("SELECT sum(cases), count(*), sum(findings) FROM cells")
    [(batches,)] = rows("SELECT sum(cases) FROM batches")
    [(findings, of_them)] = rows("SELECT count(*), sum(cases) FROM findings")
    outcomes = {name for (name,) in rows("SELECT DISTINCT outcome FROM cells")}
    assert cases == batches
    assert in_findings == of_them > 0
    assert read.texts["sum-cases"] == f"{cases:,}"
    assert read.texts["sum-cells"] == f"{cells:,}"
    exceptions = sum(name.startswith("#") for name in outcomes)
    assert read.texts["sum-outcomes"] == f"{len(outcomes)}, {exceptions}"
    assert read.texts["sum-findings"] == f"{findings:,}, {in_findings:,}"
    seen = {leaf for (leaf,) in rows("SELECT DISTINCT leaf FROM cells")}
    reached = sum(1 for row in leaf_rows() if row.implemented and row.leaf in seen)
    assert read.texts["sum-leaves"].startswith(f"{reached} of ")


def test_oracles_are_those_of_the_store(data, read, rows):
    for kind in ("verdicts", "fields"):
        stored = Counter()
        for key, n in rows(f"SELECT key, n FROM counts WHERE kind = '{kind}'"):  # noqa: S608 - from above
            oracle, leaf, why = key.split("\t")
            stored[oracle, leaf, why] += n
        shown = Counter()
        for oracle, leaf, why, n in data[kind]:
            shown[oracle, data["leaves"][leaf][0] if leaf >= 0 else "", why] += n
        assert shown == stored
        assert stored
    sums = Counter()
    for key, n in rows("SELECT key, n FROM counts WHERE kind = 'verdicts'"):
        sums[key.split("\t")[2]] += n
    (line,) = (row for row in read.rows["shares"] if row[0] == "liar")
    assert line[1:4] == [str(sums.total()), str(sums[""]), str(sums["finding"])]
    fields = Counter()
    for key, n in rows("SELECT key, n FROM counts WHERE kind = 'fields'"):
        fields[key.split("\t")[2]] += n
    assert line[5:7] == [str(fields.total()), str(fields[""])]
    excuse = [row for row in read.rows["excuses"] if row[1] == "liar-flags"]
    assert [row[3] for row in excuse] == [str(fields["liar-flags"])]


def test_growth_is_that_of_the_store(read, rows):
    firsts = [b * BATCH_SIZE + i for b, i in rows("SELECT batch, idx FROM cells")]
    found = [b * BATCH_SIZE + i for b, i in rows("SELECT batch, idx FROM findings")]
    _, *lines = read.rows["growth-table"]
    assert len(lines) == 12
    *lines, last = [[int(text.replace(",", "")) for text in line] for line in lines]
    for cases, cells, _, findings in lines:
        assert cells == sum(place < cases for place in firsts)
        assert findings == sum(place < cases for place in found)
    assert (last[1], last[3]) == (len(firsts), len(found))


def test_growth_over_time_is_that_of_the_store(read, rows):
    [(seconds,)] = rows("SELECT sum(seconds) FROM runs")
    merges = rows("SELECT number, first + cases, seconds FROM batches JOIN elapsed USING(number, first)")
    firsts, found = rows("SELECT batch, idx, leaf, mode FROM cells"), rows("SELECT batch, idx FROM findings")
    _, *lines = read.rows["elapsed-table"]
    assert [line[0] for line in lines] == [span(time) for _, _, time in merges] + [span(seconds)]
    for line, end in zip(lines, [*merges, merges[-1]], strict=True):
        seen = [first for first in firsts if first[:2] < end[:2]]
        pairs = {(leaf, mode) for _, _, leaf, mode in seen if leaf in LEAVES and LEAVES[leaf].implemented}
        findings = sum(first < end[:2] for first in found)
        assert line[1:] == [f"{n:,}" for n in (len(seen), len(pairs), findings)]


def drawn(text):
    """The curves of the page, chart by chart: where each point is, from (0, 0) to (1, 1)."""
    curves = re.findall(r'<polyline points="([^"]*)"', text)
    return [
        [(float(x) / 640, 1 - float(y) / 200) for x, y in (point.split(",") for point in curve.split())]
        for curve in curves
    ]


def test_curves_go_through_the_numbers(text, coverage):
    curves = drawn(text)
    assert len(curves) == 6
    lines = [[(m.seconds, m[2:]) for m in coverage.elapsed], [(p.cases, p[1:]) for p in coverage.growth]]
    for curve, (points, which) in zip(curves, itertools.product(lines, range(3)), strict=True):
        end, most = points[-1][0], points[-1][1][which]
        assert most > 0
        assert curve[0] == (0, 0)
        wanted = [(at / end, numbers[which] / most) for at, numbers in points]
        assert curve[1:] == [pytest.approx(point, abs=1e-3) for point in wanted]


def test_captions_are_the_last_numbers(text, rows):
    [(cases, cells)] = rows("SELECT sum(cases), count(*) FROM cells")
    [(findings,)] = rows("SELECT count(*) FROM findings")
    [(seconds,)] = rows("SELECT sum(seconds) FROM runs")
    for end in (f"{cases:,} cases", span(seconds)):
        assert f"<figcaption>findings: {findings:,} after {end}</figcaption>" in text
    assert f"<figcaption>cells: {cells:,} after {span(seconds)}</figcaption>" in text


def test_a_campaign_of_unknown_times_has_no_growth_over_them(coverage):
    text = page(msgspec.structs.replace(coverage, elapsed=[]))
    assert "Over the cases" in text
    assert "Over the time" not in text
    assert len(drawn(text)) == 3


def test_never_reached_are_the_leaves_that_the_store_has_not(text, rows):
    seen = {leaf for (leaf,) in rows("SELECT DISTINCT leaf FROM cells")}
    never = [row.leaf for row in leaf_rows() if row.leaf not in seen]
    listed = re.findall(r'<li><a href="#slot-[^"]*">([^<]*)</a>', text)
    assert sorted(listed) == sorted(leaf.replace("&", "&amp;") for leaf in never)
    assert f"<p>{len(never)} leaves of the opcode tables.</p>" in text


def test_examples_are_first_cases_of_their_cells(data, rows):
    stored = {tuple(row[:5]): (f"{row[7]}:{row[8]}", row[9].hex()) for row in rows("SELECT * FROM cells")}
    assert data["examples"]
    for leaf, mode, cpl, outcome, path, where, code in data["examples"]:
        names = data["leaves"][leaf][0], data["modes"][mode]
        assert stored[(*names, cpl, data["outcomes"][outcome][0], data["paths"][path])] == (where, code)


def test_every_leaf_and_slot_is_there_once(data, read):
    assert [leaf[0] for leaf in data["leaves"][: len(LEAVES)]] == list(LEAVES)
    assert len(read.ids) == len(set(read.ids))
    assert sum(name.startswith("slot-") for name in read.ids) == 3 * 256 + 1


def test_links_lead_somewhere_on_the_page(read):
    assert read.links
    assert {link for link in read.links if link.removeprefix("#") not in read.ids} == set()


def test_nothing_is_asked_of_a_network(text):
    assert not re.search(r'(src|href)="(?!#|data:,")', text)
    assert "url(" not in text
    assert "@import" not in text


def test_the_same_campaign_gives_the_same_page(coverage, text, campaign):
    with closing(StoreView(campaign)) as view:
        assert page(coverage_of(view)) == text


def test_what_a_stranger_wrote_stays_text():
    evil = "</script><script>alert(1)</script>"
    cell = Cell(evil, evil, 0, evil, evil)
    coverage = Coverage(evil, entries={cell: Entry(1, 0, evil, b"\x90")}, verdicts={(evil, evil, evil): 1})
    text = page(coverage)
    assert "<script>alert" not in text
    assert text.count("<script") == 2
    assert embedded(page_data(coverage)) == {tuple(cell): (1, 0)}


def test_size_depends_on_cells_alone():
    cells = {Cell(leaf, "real", 0, "ok", ""): Entry(1, 0, "0:1", b"\x90") for leaf in LEAVES}
    small = page(Coverage("x", entries=cells))
    for entry in cells.values():
        entry.cases = 10**9
    assert len(page(Coverage("x", entries=cells))) < len(small) + 16 * len(cells)
