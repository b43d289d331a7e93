from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import zstandard

from emufuzz.case.delta import expect_to_outcome, normalise_expect, outcome_to_delta
from emufuzz.case.errors import CaseError
from emufuzz.case.json import case_from_json, case_to_json, outcome_from_json, outcome_to_json
from emufuzz.case.vectors import read_vectors, vector_from_json

VECTORS = Path(__file__).parents[2] / "data" / "vectors" / "kvm-6.12.jsonl.zst"
LINE = b'{"case":{"code":"90"},"expect":{"rc":"continue","length":1,"rip":"0x1"}}'


@pytest.fixture(scope="module")
def sample():
    """Every 31st vector: all modes, about 2000."""
    return list(itertools.islice(read_vectors(VECTORS), 0, None, 31))


def numeric(value):
    """JSON with strings "0x.." as numbers."""
    if isinstance(value, dict):
        return {key: numeric(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numeric(item) for item in value]
    return int(value, 16) if isinstance(value, str) and value.startswith("0x") else value


def by_byte(entries):
    return {
        int(entry["addr"], 16) + i: byte
        for entry in entries
        for i, byte in enumerate(bytes.fromhex(entry["data"]))
    }


def test_the_sample_has_all_modes(sample):
    assert len(sample) > 2000
    assert len({case.mode for case, _ in sample}) == 7


def test_cases_round_trip(sample):
    for case, _ in sample:
        assert case_from_json(case_to_json(case)) == case, case.id


def test_expectations_round_trip_as_deltas(sample):
    for case, expect in sample:
        delta = outcome_to_delta(case, expect_to_outcome(case, expect))
        if expect.get("decode_rc") == "failed":  # length means nothing then
            expect = {name: value for name, value in expect.items() if name != "length"}  # noqa: PLW2901
        assert by_byte(delta.pop("mem", [])) == by_byte(expect.get("mem", [])), case.id
        assert numeric(delta) == numeric({k: v for k, v in expect.items() if k != "mem"}), case.id


def test_expectations_round_trip_as_outcomes(sample):
    for case, expect in sample:
        outcome = expect_to_outcome(case, expect)
        assert outcome_from_json(outcome_to_json(case, outcome), case) == outcome, case.id
        assert outcome_to_delta(case, outcome) == normalise_expect(case, expect), case.id


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, []),
        ({"exception": {"vector": 6}}, [["fetch", "0x0", 15]]),
    ],
    ids=["dropped without exception", "kept with exception"],
)
def test_a_lone_leading_fetch(changes, kept):
    case, expect = vector_from_json(LINE)
    delta = normalise_expect(case, expect | changes | {"events": [["fetch", 0, 15]]})
    assert delta.get("events", []) == kept


def test_two_fetches_are_kept():
    case, expect = vector_from_json(LINE)
    fetches = [["fetch", "0xfff", 1], ["fetch", "0x1000", 14]]
    assert normalise_expect(case, expect | {"events": fetches})["events"] == fetches


def test_delta_ignores_bytes_written_with_their_old_value():
    case, expect = vector_from_json(LINE)
    written = expect | {"mem": [{"addr": "0x1", "data": "00"}, {"addr": "0x0", "data": "91"}]}
    assert normalise_expect(case, written)["mem"] == [{"addr": "0x0", "data": "91"}]


def test_delta_of_a_crash_is_the_crash():
    case, expect = vector_from_json(LINE)
    outcome = expect_to_outcome(case, expect)
    outcome.crash = "ValueError"
    assert outcome_to_delta(case, outcome) == {"crash": "ValueError"}


def test_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_bytes(b"\n" + LINE + b"\n  \n" + LINE)
    assert len(list(read_vectors(path))) == 2


BAD_LINES = {
    "junk":          (b"junk", "not valid JSON"),
    "no case":       (b'{"expect":{}}', "case: missing or not an object"),
    "no expect":     (b'{"case":{"code":""}}', "expect: missing or not an object"),
    "unknown field": (b'{"case":{"code":""},"expect":{},"x":1}', "x: unknown field"),
    "bad case":      (b'{"case":{"code":"9"},"expect":{}}', "code: '9': odd number of digits"),
}  # fmt: skip


@pytest.mark.parametrize(("line", "message"), BAD_LINES.values(), ids=BAD_LINES)
def test_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "v.jsonl"
    path.write_bytes(LINE + b"\n" + line + b"\n")
    with pytest.raises(CaseError) as error:
        list(read_vectors(path))
    assert str(error.value).startswith(f"{path}:2: {message}")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(CaseError, match="No such file"):
        list(read_vectors(tmp_path / "none"))
    with pytest.raises(CaseError, match="Is a directory"):
        list(read_vectors(tmp_path))
    whole = VECTORS.read_bytes()
    broken = tmp_path / "broken.zst"
    for data, reason in ((whole[:100], "ends too early"), (whole[:4] + b"\xff" * 99, "not readable as zstd")):
        broken.write_bytes(data)
        with pytest.raises(CaseError, match=rf"broken\.zst.*{reason}"):
            list(read_vectors(broken))


def test_several_frames_are_one_file(tmp_path):
    path = tmp_path / "two.zst"
    path.write_bytes(zstandard.compress(LINE + b"\n") + zstandard.compress(LINE))
    assert len(list(read_vectors(path))) == 2


@pytest.mark.slow
def test_all_vectors_round_trip():
    for case, expect in read_vectors(VECTORS):
        assert case_from_json(case_to_json(case)) == case, case.id
        outcome = expect_to_outcome(case, expect)
        assert outcome_from_json(outcome_to_json(case, outcome), case) == outcome, case.id
