"""Every change of a mutant changes what its dimension says, on cases that have such a thing."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from emufuzz.case.build import build_case
from emufuzz.case.model import Case, case_pages
from emufuzz.fuzz.kvm.generate import PathGenerator, PathOptions
from emufuzz.fuzz.mutate import (
    Scope,
    callbacks,
    crossover,
    instruction,
    mode,
    operands,
    path,
    sequence,
    tables,
)
from emufuzz.fuzz.mutate.mutate import PLAIN
from emufuzz.fuzz.shrink.layout import effective_address, layout_of
from emufuzz.subject.flat.scripted import read_script

#: What belongs to a dimension; nothing else of a case may change with it.
FIELDS = {
    "instruction": {"code", "rip"},
    "sequence": {"code", "count"},
    "operands": {"gpr", "rflags", "mem", "extra", "code"},
    "descriptors": {"system", "mem", "extra", "gpr", "mode"},
    "tables": {"extra"},
    "mode": {"system", "mode"},
    "path": {"extra", "system", "rflags"},
    "devices": {"extra", "port_in", "gpr"},
}
CHANGES = [(name, change) for name, pairs in PLAIN.items() for _, change in pairs]
ADD = bytes.fromhex("6681848b44332211bbaa")  # add word [rbx+rcx*4+0x11223344], 0xaabb


def _cases() -> list[Case]:
    plain = [build_case(m, b"\x01\x43\x10\xf4", rbx=0x8000) for m in ("real", "prot32", "prot64")]
    paths = PathGenerator(3, 0, PathOptions()).cases(512)
    return [*plain, build_case("prot64", ADD + b"\xf4", rbx=0x8000, physical=True), *paths]


CASES = _cases()


@pytest.mark.parametrize(("dimension", "change"), CHANGES, ids=[change.__name__ for _, change in CHANGES])
def test_a_change_changes_its_dimension_and_nothing_else(dimension, change):
    rng, done = Random(9), 0
    for case in CASES:
        new = change(case, rng)
        if new is not None and new != case:
            done += 1
            different = {name for name in case.__struct_fields__ if getattr(case, name) != getattr(new, name)}
            assert different <= FIELDS[dimension]
    assert done > 3


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (instruction.other_prefixes, "prefixes"), (instruction.other_opcode, "opcode"),
        (instruction.other_modrm, "modrm"), (instruction.other_sib, "sib"),
        (instruction.other_displacement, "disp"), (instruction.other_immediate, "imm"),
    ],
)  # fmt: skip
def test_each_part_of_an_instruction_can_change(change, part):
    case = build_case("prot32", ADD + b"\xf4")
    before = instruction.taken_apart(case)[0]
    after = [instruction.taken_apart(change(case, Random(seed)))[0] for seed in range(20)]
    assert len({getattr(insn, part) for insn in after} - {getattr(before, part)}) > 3
    assert {insn.rest for insn in after} == {b"\xf4"}


def test_an_instruction_is_taken_apart_into_its_parts():
    insn, form = instruction.taken_apart(build_case("prot32", ADD + b"\xf4"))
    parts = ("", "66", "81", "84", "8b", "44332211", "bbaa", "f4")
    assert insn == tuple(bytes.fromhex(part) for part in parts)
    assert form.mnemonic == "add"


def test_an_aimed_operand_reaches_segment_limits_page_ends_and_canonical_edges():
    case = build_case("prot64", b"\x01\x03\xf4")
    reached = set()
    for seed in range(3000):
        new = operands.aimed_operand(case, Random(seed))
        reached.add(effective_address(new, layout_of(new)))
    assert {0xFFFFFFFF, 0x7FFFFFFFFFFF - 1, 0x9000 - 1, 0xB000 - 4} <= reached


def test_an_aimed_operand_reaches_the_edges_of_devices():
    case = build_case("prot32", b"\x8b\x03\xf4")
    device = {"kind": "mmio", "addr": "0xe0010", "size": 16}
    case = msgspec.structs.replace(case, path="ept-violation", extra={"devices": [device]})
    new = [operands.aimed_operand(case, Random(seed)) for seed in range(200)]
    reached = {effective_address(case, layout_of(case)) for case in new}
    assert {0xE0010, 0xE0020, 0xE001F} <= reached


def test_the_same_place_is_kept_by_another_instruction():
    old = build_case("prot32", b"\x01\x03\xf4", rbx=0x8123)
    new = msgspec.structs.replace(old, code=b"\x8b\x44\x8e\x08\xf4")  # mov eax, [esi+ecx*4+8]
    new = operands.at_same_place(old, new)
    assert effective_address(new, layout_of(new)) == 0x8123


def test_a_changed_page_table_entry_is_on_the_way_to_something_used():
    case = build_case("prot64", b"\x01\x03\xf4", rbx=0x8000, physical=True)
    pages = case_pages(case)
    places = {entry.address for entry in tables.entries_to(pages, case.system, 0x8000)}
    assert len(places) == 4
    changed = set()
    for seed in range(60):
        after = case_pages(tables.other_page_table(case, Random(seed)))
        changed |= {(pfn << 12) + i for pfn in pages for i in range(4096) if pages[pfn][i] != after[pfn][i]}
    assert places & {address & ~7 for address in changed}


def test_a_scripted_callback_can_be_followed():
    case, scope = build_case("prot32", b"\x01\x03\xf4"), Scope(callbacks=True)
    rng = Random(4)
    for _ in range(200):
        case = callbacks.other_callbacks(case, rng, scope)
        assert read_script((case.extra or {}).get("callbacks", ())) is not None
    assert callbacks.other_callbacks(case, rng, Scope()) is None


def test_another_mode_keeps_the_code():
    case = build_case("prot32", b"\x01\x03\xf4")
    found = {mode.other_mode(case, Random(seed), Scope()).mode for seed in range(60)}
    assert len(found) == 7
    assert mode.other_mode(case, Random(1), Scope()).code == case.code


def test_another_path_is_one_of_the_scope():
    case = CASES[-1]
    assert path.other_path(case, Random(1), Scope(paths=("desc",))).path == "desc"


def test_a_sequence_is_cut_into_its_instructions():
    case = msgspec.structs.replace(build_case("prot32", b"\x90\x01\x43\x10\x40\xf4"), count=3)
    assert sequence.pieces(case) == [b"\x90", b"\x01\x43\x10", b"\x40"]


def test_a_cross_has_something_of_both():
    a = build_case("prot32", b"\x01\x03\xf4", rax=1, rbx=1, rcx=1)
    b = build_case("prot32", b"\x29\x4e\x08\xf4", rax=2, rbx=2, rcx=2, rsi=2)
    children = [crossover(a, b, Random(seed)) for seed in range(100)]
    assert any(child.code == b.code and child.gpr == a.gpr for child in children)
    assert any(child.code == a.code and set(child.gpr[:4]) >= {1, 2} for child in children)
    assert any(child.count > 1 and child.code == b"\x01\x03\x29\x4e\x08\xf4" for child in children)
