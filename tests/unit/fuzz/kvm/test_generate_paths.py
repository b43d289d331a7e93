"""Generated cases of exit paths: reproducible, valid documents, on the path asked for."""

from __future__ import annotations

import pytest

from emufuzz.arch.exceptions import PFERR_RSVD
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.paths import EXIT_PATH, PATHS
from emufuzz.fuzz.generate import Generator, Options
from emufuzz.fuzz.kvm.generate import PathGenerator, PathOptions, generator_of, possible_paths
from emufuzz.fuzz.kvm.recipes import FORCED, RECIPES
from emufuzz.fuzz.kvm.select import KINDS, chosen_plans
from emufuzz.subject.kvm import KvmSubject


def cases_of(path, count=128, seed=3, **options):
    return generator_of(seed, 0, PathOptions(paths=(path,), **options)).cases(count)


def test_same_arguments_give_equal_batches():
    one, other = (generator_of(5, 2, PathOptions()).cases(200) for _ in range(2))
    assert one == other
    assert generator_of(6, 2, PathOptions()).cases(200) != one


def test_a_longer_batch_starts_with_the_same_cases():
    assert generator_of(5, 2, PathOptions()).cases(100) == generator_of(5, 2, PathOptions()).cases(200)[:100]


@pytest.mark.parametrize("path", PATHS)
def test_cases_survive_the_exchange_format(path):
    for case in cases_of(path):
        assert case.path == path
        again = case_from_json(case_to_json(case))
        assert case_to_json(again) == case_to_json(case)


@pytest.mark.parametrize("path", PATHS)
def test_the_subject_takes_every_case(path):
    subject = KvmSubject()
    for case in cases_of(path, 64):
        subject.check(case)


@pytest.mark.parametrize("path", PATHS)
def test_ids_and_modes(path):
    cases = cases_of(path)
    assert len({case.id for case in cases}) == len(cases)
    assert {case.mode for case in cases} <= set(RECIPES[path].modes)


def test_modes_can_be_chosen():
    assert {case.mode for case in cases_of("ept-violation", modes=("prot64",))} == {"prot64"}


def test_paths_that_no_mode_has_are_left_out():
    assert "rmode-inject" not in possible_paths(PATHS, ("prot64",))
    with pytest.raises(ValueError, match="rmode-inject"):
        PathGenerator(1, 0, PathOptions(("prot64",), 1, ("rmode-inject",)))


def test_several_states_share_their_instruction():
    cases = cases_of("ept-violation", 64, states=4)
    assert all(cases[i].code == cases[i + 1].code for i in range(0, 64, 4))


def test_options_without_paths_make_flat_cases():
    generator = generator_of(1, 0, Options())
    assert type(generator) is Generator
    assert all(case.path is None for case in generator.cases(10))


def test_forced_emulation_has_its_prefix():
    assert all(case.code.startswith(FORCED) for case in cases_of("fep"))


def test_exits_are_described_or_the_instructions_own():
    """Only those that hardware raises by itself can be judged; the others reach more of the handlers."""
    machines = [(case.extra or {}).get("kvm", {}) for case in cases_of(EXIT_PATH, 256)]
    assert 0.2 < sum("exit_reason" in kvm for kvm in machines) / 256 < 0.8


def test_page_tables_that_lead_beyond_the_guests_maxphyaddr():
    """The page-table bits between the guest's and the host's MAXPHYADDR become #PF with RSVD."""
    cases = [case for case in cases_of("ept-violation-maxphyaddr", 256) if "phys" in case.extra]
    assert cases
    outcomes = KvmSubject().run(cases)
    reserved = [o for o in outcomes if o.exception is not None and (o.exception[1] or 0) & PFERR_RSVD]
    assert len(reserved) > len(cases) / 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [16, 32, 64])
def test_every_kind_has_instructions(kind, bits):
    assert chosen_plans(kind, bits)
