"""Comparison of two reports, reports as JSON, and the shares of leaves."""

from __future__ import annotations

import json
from contextlib import closing

import msgspec
import pytest
from support.coverage import make_campaign

from emufuzz.arch.leaves import leaves_of
from emufuzz.fuzz.cells import Cell
from emufuzz.fuzz.store import StoreView
from emufuzz.report.coverage.diff import compare, diff_lines
from emufuzz.report.coverage.document import DocumentError, from_json, to_json
from emufuzz.report.coverage.model import Coverage, Entry, coverage_of, grouped
from emufuzz.report.coverage.reach import MODE64, NO_CASE, PREFIX, leaf_share, modes_of, never_reached
from emufuzz.report.coverage.text import coverage_csv, coverage_lines


def covering(*families, mode="prot64", cpl=0):
    leaves = [leaf for family in families for leaf in leaves_of(family)]
    return Coverage("x", entries={Cell(leaf, mode, cpl, "ok", ""): Entry(1) for leaf in leaves})


def test_a_family_that_is_missing_is_named_and_no_other():
    diff = compare(covering("alu", "bcd", "mov"), covering("alu", "mov"))
    assert [each.family for each in diff.families] == ["bcd"]
    assert diff.families[0].gone == leaves_of("bcd")
    assert diff.lost
    lines = list(diff_lines(diff, 100))
    assert any(line.startswith("no longer covered: bcd, 3 leaves, the whole family") for line in lines)
    assert not any("alu" in line or "mov" in line for line in lines)


def test_what_is_new_is_no_loss():
    diff = compare(covering("alu"), covering("alu", "bcd"))
    assert [each.family for each in diff.families] == ["bcd"]
    assert diff.families[0].new == leaves_of("bcd")
    assert not diff.lost


def test_cells_of_common_leaves_differ_too():
    diff = compare(covering("bcd"), covering("bcd", cpl=3))
    (found,) = diff.families
    assert (found.gone, found.new, found.cells_gone, found.cells_new) == ((), (), 3, 3)
    assert not diff.lost


def test_the_same_is_the_same():
    assert compare(covering("alu"), covering("alu")).families == []
    assert "the same cells are covered" in list(diff_lines(compare(covering("alu"), covering("alu")), 80))


@pytest.fixture(scope="module")
def coverage(tmp_path_factory):
    directory = tmp_path_factory.mktemp("campaign") / "c"
    make_campaign(directory, batches=1, modes=("real", "prot32"))
    with closing(StoreView(directory)) as view:
        return coverage_of(view)


def test_a_report_can_be_read_again(coverage):
    again = from_json(to_json(coverage))
    assert again == coverage
    assert to_json(again) == to_json(coverage)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"coverage_format": 99}, "coverage_format: 99"),
        ({"cells": 1}, "cells"),
        ({"extra": 1}, "unknown field"),
    ],
)
def test_what_is_no_report_is_refused(coverage, change, said):
    value = msgspec.json.decode(to_json(coverage)) | change
    with pytest.raises(DocumentError, match=said):
        from_json(msgspec.json.encode(value))


def test_a_negative_count_is_refused(coverage):
    value = msgspec.json.decode(to_json(coverage))
    value["cells"][0]["cases"] = -1
    with pytest.raises(DocumentError, match=r"Expected `int` >= 0 - at `\$.cells\[0\].cases`"):
        from_json(msgspec.json.encode(value))


def test_numbers_beyond_reason_are_refused(coverage):
    value = msgspec.json.decode(to_json(coverage))
    for change in (
        {"growth": [[10**300, 0, 0, 0]]},
        {"elapsed": [[-1.0, 0, 0, 0, 0]]},
        {"findings": 1 << 60},
    ):
        with pytest.raises(DocumentError, match=next(iter(change))):
            from_json(json.dumps(value | change).encode())


def test_a_report_of_the_format_before_is_read(coverage):
    value = msgspec.json.decode(to_json(coverage)) | {"coverage_format": 1}
    del value["elapsed"]
    again = from_json(msgspec.json.encode(value))
    assert again == msgspec.structs.replace(coverage, elapsed=[])


def test_the_format_is_looked_at_before_the_rest():
    with pytest.raises(DocumentError, match="coverage_format: 3, this emufuzz knows up to 2"):
        from_json(b'{"coverage_format": 3, "what": "comes later"}')


def test_csv_has_every_cell(coverage):
    head, *lines = "".join(coverage_csv(coverage)).splitlines()
    assert head == "leaf,mnemonic,family,mode,cpl,outcome,path,cases,findings,first,code"
    assert len(lines) == len(coverage.entries)
    assert sum(int(line.split(",")[-4]) for line in lines) == coverage.cases == 1024


def test_tables_for_people_have_the_sums(coverage):
    text = "\n".join(coverage_lines(coverage, 100))
    whole = grouped(coverage.entries.items())
    assert f"{whole.cases:,} cases in {whole.cells:,} cells" in text
    assert NO_CASE in text


def test_tables_for_people_show_growth_over_the_time(coverage):
    lines = list(coverage_lines(coverage, 100))
    at = next(i for i, line in enumerate(lines) if line.startswith("after  cases  cells"))
    moments = [
        f"{m.seconds:.1f} s {m.cases:,} {m.cells:,} {m.pairs:,} {m.findings:,}" for m in coverage.elapsed
    ]
    assert [" ".join(line.split()) for line in lines[at + 2 : at + 2 + len(moments)]] == moments
    assert [m.seconds for m in coverage.elapsed] == [1.5, 2.0]
    without = list(coverage_lines(msgspec.structs.replace(coverage, elapsed=[]), 100))
    head = next(i for i, line in enumerate(without) if line.startswith("cases  cells  leaves x modes"))
    shown = without[head + 2 : without.index("", head)]
    assert len(shown) == 12
    assert shown[-1].split() == [f"{n:,}" for n in coverage.growth[-1]]


def test_tables_for_people_say_what_was_not_compared():
    verdicts = {("liar", "90", ""): 3, ("liar", "90", "liar-nop"): 1}
    fields = {("liar", "90", ""): 1, ("liar", "90", "liar-flags"): 3}
    found = Coverage("x", oracles=("liar",), verdicts=verdicts, fields=fields)
    lines = [line.split() for line in coverage_lines(found, 120)]
    assert ["liar", "4", "3", "0", "75.0", "%", "25.0", "%"] in lines
    assert ["liar", "liar-nop", "1", "0", "1"] in lines
    assert ["liar", "liar-flags", "0", "3", "1"] in lines


def test_leaves_that_the_modes_do_not_have_do_not_count(coverage):
    reached, possible = leaf_share(coverage)
    assert 0 < reached <= possible
    reasons = {each.row.leaf: each.reason for each in never_reached(coverage)}
    assert reasons["63.mode64"] == MODE64
    assert reasons["f0"] == PREFIX
    assert modes_of("40") == {"real", "vm86", "prot16", "prot32", "compat16", "compat32"}
    whole = Coverage("x", modes=("prot64",), entries={Cell("90", "prot64", 0, "ok", ""): Entry(1)})
    assert leaf_share(whole)[1] < leaf_share(Coverage("x"))[1]
