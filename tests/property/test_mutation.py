"""Laws of mutation and crossover: valid cases of the scope, mostly decodable, decided by the seed alone."""

from __future__ import annotations

from functools import cache
from random import Random

import pytest

from emufuzz.case.check import check_system
from emufuzz.case.json import case_from_obj, case_to_obj
from emufuzz.case.model import Case
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.kvm.generate import PathGenerator, PathOptions
from emufuzz.fuzz.mutate import Scope, crossover, mutate
from emufuzz.fuzz.mutate.sequence import LONGEST
from emufuzz.subject.flat import FlatSubject
from emufuzz.subject.kvm import KvmSubject

FLAT = Scope(callbacks=True)
KVM = Scope(paths=PATHS)
DECODABLE = 0.90


@cache
def _parents(subject: str) -> list[Case]:
    if subject == "emulator":
        return generate_batch(7, 0, 512)
    return PathGenerator(7, 0, PathOptions()).cases(512)


def _mutants(subject: str, count: int, seed: int = 3) -> list[Case]:
    """Mutants of mutants, up to four generations deep, and crosses of them."""
    rng, scope = Random(seed), FLAT if subject == "emulator" else KVM
    pool = list(_parents(subject))
    made = []
    for _ in range(count):
        parent = rng.choice(pool)
        if rng.getrandbits(1):
            child = mutate(parent, rng, scope)
        else:
            child = crossover(parent, rng.choice(pool), rng, scope)
        made.append(child)
        pool[rng.randrange(len(pool))] = child
    return made


@pytest.mark.parametrize(("subject", "count"), [("emulator", 800), ("kvm", 200)])
def test_a_mutant_is_a_valid_case(subject, count):
    for case in _mutants(subject, count):
        again = case_from_obj(case_to_obj(case))
        assert case_to_obj(again) == case_to_obj(case)
        assert case.path == "invalid-guest-state" or check_system(case.system, case.rflags) == []


def test_kvm_takes_every_mutant():
    subject = KvmSubject()
    for case in _mutants("kvm", 300):
        subject.check(case)


@pytest.mark.parametrize("change", ["mutate", "crossover"])
def test_nine_in_ten_mutants_decode(change):
    rng, pool = Random(11), _parents("emulator")
    if change == "mutate":
        made = [mutate(rng.choice(pool), rng) for _ in range(2000)]
    else:
        made = [crossover(rng.choice(pool), rng.choice(pool), rng) for _ in range(2000)]
    decoded = [outcome.decode_rc == "ok" for outcome in FlatSubject(events=False).run(made)]
    assert sum(decoded) >= DECODABLE * len(made)


def test_nine_in_ten_mutants_that_come_to_the_emulator_decode():
    outcomes = KvmSubject().run(_mutants("kvm", 400))
    came = [outcome for outcome in outcomes if "no_exit" not in (outcome.extra or {})]
    assert len(came) > 0.6 * len(outcomes)
    assert sum(outcome.decode_rc == "ok" for outcome in came) >= DECODABLE * len(came)
    assert not [outcome.crash for outcome in outcomes if outcome.crash]


@pytest.mark.parametrize("subject", ["emulator", "kvm"])
def test_the_seed_decides(subject):
    assert _mutants(subject, 100) == _mutants(subject, 100)
    assert _mutants(subject, 100) != _mutants(subject, 100, seed=4)


def test_a_mutant_has_a_mode_of_the_scope():
    scope = Scope(modes=("prot32", "prot64"))
    rng, pool = Random(2), [case for case in _parents("emulator") if case.mode in scope.modes]
    assert {mutate(rng.choice(pool), rng, scope).mode for _ in range(1000)} == set(scope.modes)


def test_without_paths_in_the_scope_the_path_stays():
    rng = Random(5)
    for case in _parents("kvm")[:200]:
        assert mutate(case, rng).path == case.path


def test_with_paths_in_the_scope_a_mutant_may_have_another():
    rng, pool = Random(5), [case for case in _parents("kvm") if case.path == "desc"]
    scope = Scope(paths=("desc", "ud"))
    assert {mutate(rng.choice(pool), rng, scope).path for _ in range(300)} == {"desc", "ud"}


def test_sequences_grow_up_to_eight_instructions():
    rng, case = Random(1), _parents("emulator")[0]
    counts = set()
    for _ in range(3000):
        case = mutate(case, rng)
        counts.add(case.count)
    assert max(counts) == LONGEST
    assert min(counts) == 1
