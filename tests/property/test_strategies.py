"""The public strategies: what they promise holds for what they draw, and examples shrink to plain ones."""

from __future__ import annotations

import runpy
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st

from emufuzz.arch.modes import MODES
from emufuzz.case.check import check_descriptors, check_system
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import case_memory
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.corpus.legal import legal_pairs
from emufuzz.fuzz.strategies import (
    PATHS_OF_STRATEGIES,
    State,
    addresses,
    cases,
    instructions,
    path_cases,
    phys_cases,
    states,
    systems,
    words,
)
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject
from tests.property.test_emulator_random import violations

FLAT, KVM = FlatSubject(), KvmSubject()
DOC = Path(__file__).parents[2] / "docs" / "hypothesis.md"
MODE = st.sampled_from(MODES)
#: A state has some thirty choices, which take their time on a busy machine.
CALM = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def run(case):
    (outcome,) = (KVM if case.path else FLAT).run([case])
    assert not outcome.crash
    return outcome


@CALM
@given(MODE.flatmap(lambda mode: st.tuples(st.just(mode), instructions(mode), states(mode))))
def test_an_instruction_is_one_of_the_legal_leaves_of_its_mode(drawn):
    mode, code, state = drawn
    outcome = run(state.case(code + b"\xf4" * 15))
    assert outcome.decode_rc == "failed" or (outcome.leaf, mode) in legal_pairs()
    assert len(code) <= 15


@pytest.mark.parametrize(
    ("mode", "leaf"), [("real", "00"), ("prot32", "f7/6"), ("prot64", "0f2b.pfx_66.mem")]
)
@settings(CALM, max_examples=30)
@given(data=st.data())
def test_an_instruction_is_of_the_leaf_that_was_asked_for(mode, leaf, data):
    code = data.draw(instructions(mode, [leaf]))
    outcome = run(data.draw(states(mode)).case(code + b"\xf4" * 15))
    assert outcome.leaf == leaf
    assert outcome.length in (None, len(code))


@CALM
@given(states())
def test_a_state_is_one_that_a_processor_can_be_in(state):
    assert check_system(state.system, state.rflags) == []
    assert check_descriptors(state.system, state.rflags, state.mem) == []
    assert isinstance(state, State)


@CALM
@given(systems("prot32", 2))
def test_a_system_has_the_privilege_level_that_was_asked_for(system):
    assert {system.seg[1].dpl, system.seg[2].dpl} == {2}


@CALM
@given(st.one_of(cases(), phys_cases(), path_cases()))
def test_a_case_is_valid_and_survives_json(case):
    assert case_from_json(case_to_json(case)) == case
    refused = check_system(case.system, case.rflags)
    assert bool(refused) == (case.path == "invalid-guest-state")


@settings(CALM, max_examples=150)
@given(cases())
def test_the_emulator_keeps_its_rules_in_any_case(case):
    assert violations(case, run(case)) == []


@CALM
@given(phys_cases("prot64"))
def test_page_tables_map_the_memory_of_the_case(case):
    outcome = run(msgspec.structs.replace(case, path="exit"))
    flat = msgspec.structs.replace(case, mem=case_memory(case), extra=None)
    if "no_exit" not in outcome.extra:
        assert outcome.leaf in ("", run(flat).leaf)


@pytest.mark.parametrize("path", PATHS_OF_STRATEGIES)
def test_most_cases_of_a_path_take_it(path):
    taken = []

    @settings(CALM, max_examples=25, database=None, derandomize=True)
    @given(path_cases(path))
    def enter(case):
        KVM.check(case)
        taken.append("no_exit" not in run(case).extra)

    enter()
    assert sum(taken) >= 0.6 * len(taken)


def test_every_path_has_a_strategy():
    assert set(PATHS_OF_STRATEGIES) == set(PATHS)


def test_examples_shrink_to_plain_ones():
    assert find(instructions("prot32", ["00", "01"]), lambda _: True) == b"\x00\xc0"
    prefixed = find(instructions("prot32"), lambda code: code[0] == 0x66, random=Random(0))
    assert len(prefixed) <= 4  # behind the prefix no more than two bytes of opcode, and ModRM
    case = find(cases("prot32"), lambda case: run(case).exception is not None)
    assert sum(map(bool, case.gpr)) <= 2  # RSP, and at most what the fault needs
    assert find(words(64), lambda value: value > 0x80) == 0x81
    assert find(addresses(), lambda address: address >= 0) == 0x8000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: instructions("real64"), "real64 is not one of"),
        (lambda: instructions("real", ["nop"]), "there is no leaf nop"),
        (lambda: instructions("prot32", ["63.mode64"]), "can be reached in prot32"),
        (lambda: states("real", 3), "no mode of real has CPL 3"),
        (lambda: cases("vm86", cpl=0), "has CPL 0"),
        (lambda: path_cases("warp"), "warp is not one of"),
        (lambda: path_cases("shadow-pf", "prot64"), "no such path in prot64"),
    ],
)
def test_what_cannot_be_is_refused_at_once(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_example_in_the_documentation_runs(tmp_path):
    blocks = DOC.read_text().split("```python\n")[1:]
    assert blocks
    for number, block in enumerate(blocks):
        script = tmp_path / f"example_{number}.py"
        script.write_text(block.split("```")[0])
        names = runpy.run_path(str(script))
        tests = [value for name, value in names.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            CALM(test)()
