"""The opcode maps against the table of facts, row by row, and against their golden listing."""

from __future__ import annotations

import csv
from importlib import resources
from pathlib import Path

import pytest

from emufuzz.emulator.flags import FLAG_WORDS, OPERAND_KINDS, describe
from emufuzz.emulator.opcode import Opcode, leaves
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE

GOLDEN = Path(__file__).parent / "golden" / "opcode_table.txt"
LEAVES = {op.leaf: op for table in (ONE_BYTE, TWO_BYTE, THREE_BYTE) for op in leaves(table)}


def facts() -> list[dict[str, str]]:
    text = resources.files("emufuzz.arch").joinpath("opcodes.csv").read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


def words(flags: str) -> set[str]:
    return set(flags.split("|")) - {""}


def handler(op: Opcode) -> str:
    if op.execute is None:
        return ""
    return "switch" if op.in_switch else op.execute.__name__


def status(op: Opcode) -> str:
    if op.d & FLAG_WORDS["NotImpl"]:
        return "notimpl"
    if op.d & FLAG_WORDS["Undefined"]:
        return "undefined(#UD)"
    if op.execute is None:
        return "decode-only(EMULATION_FAILED at exec)"
    return "impl(switch)" if op.in_switch else "impl"


def row(op: Opcode) -> str:
    kinds = " ".join(OPERAND_KINDS[kind] for kind in (op.dst, op.src, op.src2))
    hook = op.check_perm.__name__ if op.check_perm else "-"
    return (
        f"{op.leaf:24} {op.mnemonic or '-':26} {handler(op) or '-':16} {kinds:22} "
        f"{hook:16} {op.intercept or '-':8} {describe(op.d)}"
    )


def test_every_leaf_of_the_facts_is_in_the_tables_and_no_other():
    assert {f["leaf"] for f in facts()} == set(LEAVES)
    assert len(LEAVES) == 1241


@pytest.mark.parametrize(
    "column", ["src", "src2", "dst", "flags", "handler", "check_perm", "intercept", "status"]
)
def test_tables_equal_the_facts(column):
    different = []
    for fact in facts():
        op = LEAVES[fact["leaf"]]
        ours: object = {
            "src": OPERAND_KINDS[op.src],
            "src2": OPERAND_KINDS[op.src2],
            "dst": OPERAND_KINDS[op.dst],
            "flags": words(describe(op.d)),
            "handler": handler(op),
            "check_perm": op.check_perm.__name__ if op.check_perm else "",
            "intercept": op.intercept,
            "status": status(op),
        }[column]
        theirs: object = words(fact[column]) if column == "flags" else fact[column]
        if ours != theirs:
            different.append((op.leaf, ours, theirs))
    assert different == []


def test_counts_by_status():
    counts: dict[str, int] = {}
    for op in LEAVES.values():
        counts[status(op)] = counts.get(status(op), 0) + 1
    assert counts == {
        "impl": 377,
        "impl(switch)": 96,
        "decode-only(EMULATION_FAILED at exec)": 15,
        "undefined(#UD)": 15,
        "notimpl": 738,
    }


def test_golden_listing():
    listing = "\n".join(row(op) for op in LEAVES.values() if status(op) != "notimpl") + "\n"
    assert listing == GOLDEN.read_text(encoding="utf-8"), "regenerate with: python tests/tables/regenerate.py"


def test_every_flag_bit_has_one_name():
    bits = list(FLAG_WORDS.values())
    assert len(set(bits)) == len(bits)
    assert all(bit.bit_count() == 1 for bit in bits)
    everything = sum(bits)
    assert words(describe(everything)) == set(FLAG_WORDS)
    assert all(op.d & ~everything == 0 for op in LEAVES.values())
