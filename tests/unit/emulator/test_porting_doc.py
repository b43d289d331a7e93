"""docs/porting.md: written from the code as it is now, complete, with a test behind each quirk."""

from __future__ import annotations

import re
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: Handlers that are macros (fastops) in C.
FASTOPS = {
    "em_add", "em_or", "em_adc", "em_sbb", "em_and", "em_sub", "em_xor", "em_cmp", "em_test", "em_cmp_r",
    "em_xadd", "em_not", "em_neg", "em_inc", "em_dec", "em_mul_ex", "em_imul_ex", "em_div_ex", "em_idiv_ex",
    "em_imul", "em_shld", "em_shrd", "em_rol", "em_ror", "em_rcl", "em_rcr", "em_shl", "em_shr", "em_sar",
    "em_bt", "em_bts", "em_btr", "em_btc", "em_salc",
}  # fmt: skip
QUIRK_TEST = re.compile(r"^def test_quirk_(\d\d)_", re.MULTILINE)


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(ROOT / "docs"))
    yield import_module("generate_porting")
    sys.path.remove(str(ROOT / "docs"))


@pytest.fixture(scope="module")
def tables(generator):
    return generator.tables


def test_the_document_is_up_to_date(generator):
    hint = "run: python docs/generate_porting.py"
    assert (ROOT / "docs/porting.md").read_text("utf-8") == generator.render(), hint


def test_every_deviation_names_the_manual(generator):
    missing = [
        d for d in generator.deviations() if not generator.REFERENCE.search(d.text + generator.reference(d))
    ]
    assert missing == []


def test_every_named_function_exists(generator, tables):
    by_name = generator.index()
    named = {name for names in tables.FUNCTIONS.values() for name in names.split()}
    assert set(tables.RENAMED) | set(tables.DISSOLVED) <= named
    for name in named - set(tables.DISSOLVED):
        for python in tables.RENAMED.get(name, name).split():
            assert python in by_name, python


def test_functions_are_listed_once(tables):
    listed = Counter(name for names in tables.FUNCTIONS.values() for name in names.split())
    assert max(listed.values()) == 1


def test_every_handler_of_the_port_is_found_by_its_name(generator):
    """A handler's name says where emulate.c has it, except for rows of its opcode switch (sw_*)."""
    listed = {name for names in generator.tables.FUNCTIONS.values() for name in names.split()}
    handlers = {
        definition.name
        for path in generator.modules()
        if path.parent.name == "insn"
        for definition in generator.definitions(path)
        if definition.name.startswith("em_")
    }
    assert all(re.fullmatch(r"em_[a-z0-9_]+", name) for name in handlers)
    assert handlers - FASTOPS <= listed


def test_every_quirk_is_marked_where_it_is(generator, tables):
    marked = {deviation.owner for deviation in generator.deviations()}
    for quirk in tables.QUIRKS:
        assert set(quirk.places.split()) <= marked, quirk


def test_every_marker_outside_the_quirks_is_known(generator, tables):
    """A deviation that has no number of its own belongs to a numbered one nearby."""
    numbered = {place for quirk in tables.QUIRKS for place in quirk.places.split()}
    assert {deviation.owner for deviation in generator.deviations()} - numbered == {
        "string_registers_quirk", "_do_task_switch", "_task_switch_16", "_task_switch_32",
    }  # fmt: skip


def test_every_quirk_of_the_emulator_has_one_test(tables):
    tested = Counter(
        int(number)
        for path in sorted(Path(__file__).parent.glob("test_*.py"))
        for number in QUIRK_TEST.findall(path.read_text("utf-8"))
    )
    assert [quirk.number for quirk in tables.QUIRKS] == list(range(1, len(tables.QUIRKS) + 1))
    assert tested == Counter(quirk.number for quirk in tables.QUIRKS if quirk.places)
