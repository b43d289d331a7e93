"""Counts of a run that can be gone on with."""

from __future__ import annotations

import json

import pytest

from emufuzz.fuzz.generate import Options
from emufuzz.fuzz.vouch import count_tasks, tasks_of
from emufuzz.fuzz.vouch_file import VouchFileError, load, save
from emufuzz.fuzz.vouched import Vouched

RUN = {"cases": 1100, "seed": 1}


@pytest.fixture(scope="module")
def parts():
    """What the two batches of a run count."""
    tasks = tasks_of(("emulator",), 1, 1100, {"emulator": Options(("real",))})
    return list(count_tasks(tasks, (), 1))


def merged(parts):
    total = Vouched()
    for part in parts:
        total.merge(part)
    return total


def test_a_run_goes_on_where_it_ended(parts, tmp_path):
    path = tmp_path / "counts.json"
    assert load(path, RUN) == (0, Vouched())
    save(path, RUN, 1, merged(parts[:1]))
    done, total = load(path, RUN)
    assert done == 1
    total.merge(parts[1])
    assert total == merged(parts)
    save(path, RUN, 2, total)
    assert load(path, RUN) == (2, merged(parts))
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_counts_are_the_same_bytes(parts, tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    save(one, RUN, 2, merged(parts))
    save(other, RUN, 2, merged(reversed(parts)))
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize(
    ("text", "word"),
    [("[]", "no JSON object"), ("{", "no JSON"), ("[" * 100000, "no JSON"), ('{"format":2}', "format"),
     ('{"format":1}', "run.cases"), ('{"format":1,"run":{"cases":5}}', "run.cases")],
)  # fmt: skip
def test_another_file_is_refused(tmp_path, text, word):
    path = tmp_path / "counts.json"
    path.write_text(text)
    with pytest.raises(VouchFileError, match=word):
        load(path, RUN)


@pytest.mark.parametrize(
    ("field", "value"),
    [("batches", -1), ("batches", "x"), ("batches", True), ("counts", {}), ("counts", 5),
     ("counts.classes", [[["agreed"], "1"]]), ("counts.fields", [[[], 1]]), ("counts.by", [[["x"], -1]]),
     ("counts.alone", [["x", 1]]), ("run.version", "0"), ("run.seed", 2)],
)  # fmt: skip
def test_damage_is_refused(parts, tmp_path, field, value):
    path = tmp_path / "counts.json"
    save(path, RUN, 2, merged(parts))
    fields = json.loads(path.read_text())
    name, _, inner = field.partition(".")
    if inner:
        fields[name][inner] = value
    else:
        fields[name] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(VouchFileError, match=f"^{name}"):
        load(path, RUN)
