"""docs/kvm-model.md names every exit reason and every path, with tests that exist and what they say."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from emufuzz.case.paths import PATHS
from emufuzz.kvm import exit_reasons
from emufuzz.kvm.exits import KVM_VMX_EXIT_HANDLERS
from emufuzz.kvm.options import KvmOptions
from emufuzz.subject.kvm.paths import PATH_SPECS

ROOT = Path(__file__).parents[3]
DOCUMENT = (ROOT / "docs/kvm-model.md").read_text("utf-8")
_PREFIX = "EXIT_REASON_"
NAMES = {
    value: name.removeprefix(_PREFIX)
    for name, value in vars(exit_reasons).items()
    if name.startswith(_PREFIX) and isinstance(value, int)
}


def table(title: str) -> list[list[str]]:
    """The cells of the table under a heading, without its first two lines."""
    section = DOCUMENT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines[2:]]


EXITS = {int(row[0]): row[1:] for row in table("Exit reasons")}
PATH_ROWS = {row[1].strip("`"): row for row in table("Paths")}


@cache
def source(folder: str, name: str) -> str:
    return (ROOT / "tests/unit" / folder / name).read_text("utf-8")


def check_test(folder: str, cell: str) -> str:
    """The test that a cell names is a function of that file; its text."""
    found = re.fullmatch(r"`(test_\w+\.py)::(test_\w+)`", cell)
    assert found, cell
    _, start, rest = source(folder, found[1]).partition(f"\ndef {found[2]}(")
    assert start, cell
    return rest.split("\ndef ")[0]


def test_every_exit_reason_has_a_row() -> None:
    assert sorted(EXITS) == list(range(76))
    assert {reason: row[0] for reason, row in EXITS.items() if row[0] != "-"} == NAMES


@pytest.mark.parametrize("reason", range(76))
def test_a_row_names_the_handler_and_a_test(reason: int) -> None:
    _, handler, what, test = EXITS[reason]
    actual = KVM_VMX_EXIT_HANDLERS.get(reason)
    assert handler.strip("`") == ("-" if actual is None else actual.__name__)
    assert what
    check_test("kvm", test)


def test_the_table_of_handlers_has_no_reason_that_is_not_in_the_document() -> None:
    assert KVM_VMX_EXIT_HANDLERS.keys() <= EXITS.keys()


def test_every_path_has_a_row_in_the_order_of_the_exchange_format() -> None:
    assert tuple(PATH_ROWS) == PATHS
    assert [row[0] for row in PATH_ROWS.values()] == [*map(str, range(1, 18)), "-"]


@pytest.mark.parametrize("path", PATHS)
def test_a_path_names_its_knobs_and_a_test(path: str) -> None:
    _, _, reasons, emultype, knobs, preconditions, test = PATH_ROWS[path]
    named = set(re.findall(r"`(\w+)`", knobs))
    assert named == set(PATH_SPECS[path].knobs)
    assert named <= set(KvmOptions.__dataclass_fields__)
    assert emultype
    assert preconditions
    assert reasons in ("any", "none") or all(int(reason) in NAMES for reason in reasons.split(", "))
    assert f'"{path}"' in check_test("subject", test)  # it enters that path


@pytest.mark.parametrize("link", re.findall(r"\]\(([\w.-]+)\)", DOCUMENT))
def test_links_lead_somewhere(link: str) -> None:
    assert (ROOT / "docs" / link).exists()
