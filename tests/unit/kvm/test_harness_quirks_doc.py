"""docs/porting.md names a test for every quirk, and tests at real exits for those around the emulator."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
AROUND_THE_EMULATOR = (12, 15, 17, 18, 36, *range(46, 57), 58, 62, 64, 66)


@pytest.fixture(scope="module")
def generator():
    sys.path.insert(0, str(ROOT / "docs"))
    yield import_module("generate_porting")
    sys.path.remove(str(ROOT / "docs"))


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("test_quirk_13_66_with_f2", [13]),
        ("test_quirks_17_18_a_shadow", [17, 18]),
        ("test_quirk_9", []),
        ("test_other_12_a", []),
    ],
)
def test_numbers_in_names(generator, name, numbers):
    assert generator.quirks_of(name) == numbers


def test_every_quirk_has_a_test_where_it_is(generator):
    tests = generator.quirk_tests()
    for quirk in generator.tables.QUIRKS:
        folders = {module.partition("/")[0] for module in tests[quirk.number]}
        expected = {folder for folder, places in (("emulator", quirk.places), ("kvm", quirk.model)) if places}
        assert expected, quirk
        assert expected <= folders, quirk


def test_what_only_the_machine_around_the_emulator_shows_is_tested_there(generator):
    """MMIO, userspace, events and nested guests: these quirks have tests that enter KVM."""
    tests = generator.quirk_tests()
    for number in AROUND_THE_EMULATOR:
        assert any(module.startswith("kvm/") for module in tests[number]), number


def test_no_test_is_of_an_unknown_quirk(generator):
    assert set(generator.quirk_tests()) == {quirk.number for quirk in generator.tables.QUIRKS}


def test_a_place_that_is_gone_is_an_error(generator):
    assert generator.model_place("x86.py:_writeback") == "`kvm/x86.py`: `_writeback`"
    with pytest.raises(KeyError, match=r"x86\.py:writeback"):
        generator.model_place("x86.py:writeback")
