"""The generator: deterministic, covers the tables, encodes what it means to."""

from __future__ import annotations

from collections import Counter

import pytest

from emufuzz.arch.leaves import LEAVES, leaf_rows
from emufuzz.arch.modes import MODES, mode_of
from emufuzz.case.model import code_address
from emufuzz.fuzz.encode import effect_of, memory_forms
from emufuzz.fuzz.environments import environments
from emufuzz.fuzz.forms import forms
from emufuzz.fuzz.generate import HLT, Generator, Options, generate_batch
from emufuzz.fuzz.plans import PLAN_COUNT, plans
from emufuzz.subject.flat import FlatSubject

UNREACHABLE = {f"{byte:02x}" for byte in (0x26, 0x2E, 0x36, 0x3E, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3)}


def test_same_arguments_give_equal_batches():
    assert generate_batch(7, 3, 200) == generate_batch(7, 3, 200)


def test_a_longer_batch_starts_with_the_same_cases():
    assert generate_batch(7, 3, 300)[:100] == generate_batch(7, 3, 100)


def test_seed_and_number_matter():
    base = [case.code for case in generate_batch(1, 1, 50)]
    assert base != [case.code for case in generate_batch(2, 1, 50)]
    assert base != [case.code for case in generate_batch(1, 2, 50)]


def test_ids_are_unique_and_name_seed_and_batch():
    cases = generate_batch(9, 4, 500)
    assert len({case.id for case in cases}) == 500
    assert cases[17].id == "s9-b4-17"


def test_labels_agree_with_the_state():
    for case in generate_batch(1, 0, 2000):
        cs = case.system.seg[1]
        assert case.mode == mode_of(case.system.cr0, case.system.efer, case.rflags, cs.l, cs.db) or (
            case.mode == "real" and cs.db
        )


def test_values_are_in_range():
    for case in generate_batch(1, 1, 2000):
        limit = 1 << (64 if case.mode == "prot64" else 32)
        assert all(0 <= value < limit for value in case.gpr)
        assert 0 <= case.rip < 1 << 64
        assert 0 < len(case.code) <= 32


def test_code_ends_with_hlt_unless_it_ends_at_a_page():
    for case in generate_batch(1, 2, 4000):
        at_edge = (code_address(case) + len(case.code)) % 4096 == 0
        assert at_edge or case.code.endswith(HLT)


def test_code_slots_are_fresh_within_a_batch():
    slots = Counter(
        code_address(case) & ~31 for case in generate_batch(1, 3, 1500) if case.code.endswith(HLT)
    )
    assert max(slots.values()) == 1


def test_states_share_code_rip_and_system():
    cases = generate_batch(1, 0, 64, Options(states=4))
    for first in range(0, 64, 4):
        group = cases[first : first + 4]
        assert len({(case.code, case.rip, id(case.system)) for case in group}) == 1
        assert len({case.gpr for case in group}) == 4


def test_modes_are_those_asked_for():
    cases = generate_batch(1, 0, 400, Options(modes=("real", "prot64")))
    assert {case.mode for case in cases} == {"real", "prot64"}


def test_batches_share_few_systems_and_memories():
    cases = [case for number in range(4) for case in generate_batch(5, number, 1000)]
    assert len({id(case.system) for case in cases}) <= 64
    assert len({id(case.mem) for case in cases}) <= 3 * len(MODES)


def test_every_leaf_of_the_tables_has_a_form():
    reachable = {form.leaf for form in forms()}
    missing = {row.leaf for row in leaf_rows()} - reachable
    assert missing == {row.leaf for row in leaf_rows() if row.leaf in UNREACHABLE | {"0f", "0f38"}}


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_every_form_of_a_bitness_is_planned(bits):
    planned = {plan.form for plan in plans(bits)}
    assert planned == {form for form in forms() if form.mode64 in (None, bits == 64)}
    assert len(plans(bits)) == PLAN_COUNT


def test_encodings_decode_to_the_leaf_they_were_made_for():
    generator = Generator(3, 0, Options())
    cases = generator.cases(6000)
    outcomes = FlatSubject(events=False).run(cases)
    decoded = meant = 0
    for i, outcome in enumerate(outcomes):
        if outcome.decode_rc == "ok":
            decoded += 1
            meant += outcome.leaf == generator.leaf_of(i)
    assert decoded > 4000
    assert meant > 0.99 * decoded  # page-end cases may be cut to another instruction


def test_most_cases_are_implemented_and_do_not_fault():
    outcomes = FlatSubject(events=False).run(generate_batch(1, 0, 5000))
    kinds = Counter(outcome.rc for outcome in outcomes)
    assert not any(outcome.crash for outcome in outcomes)
    assert kinds["continue"] > 3500
    assert kinds["propagate_fault"] > 300
    assert kinds["unhandleable"] < 700


def test_vectors_of_faults_occur():
    vectors = {
        outcome.exception[0]
        for outcome in FlatSubject(events=False).run(generate_batch(1, 0, 8000))
        if outcome.exception is not None
    }
    assert vectors >= {0, 6, 12, 13, 14}


def test_all_cpls_occur():
    cpls = {env.system.seg[2].dpl for mode in MODES for env in environments(1, mode)}
    assert cpls == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("bits", "data", "op", "ad"),
    [
        (16, b"", 2, 2),
        (16, b"\x66\x67", 4, 4),
        (32, b"\x66", 2, 4),
        (64, b"\x66\x48", 8, 8),
        (64, b"\x48\x66", 2, 8),
        (64, b"\x67", 4, 4),
    ],
)
def test_effect_of_prefixes(bits, data, op, ad):
    effect = effect_of(bits, data)
    assert (effect.op_bytes, effect.ad_bytes) == (op, ad)


@pytest.mark.parametrize(("ad", "count"), [(2, 24), (4, 3 * 256 + 21), (8, 3 * 256 + 21)])
def test_all_memory_forms_occur(ad, count):
    assert len({form.by_reg for form in memory_forms(ad, 0, ad == 8)}) == count


def test_sib_with_rsp_has_no_index():
    for form in memory_forms(8, 0, True):
        assert form.index_reg != 4
    assert any(form.index_reg == 12 for form in memory_forms(8, 2, True))


def test_leaves_in_use_are_known():
    assert {form.leaf for form in forms()} <= set(LEAVES)
