"""What libFuzzer calls to change inputs, without libFuzzer."""

from __future__ import annotations

from random import Random

import msgspec
import pytest

from emufuzz.arch.modes import MODES
from emufuzz.case.codec import decode_case, encode_case
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import PAGE_MASK, PAGE_SIZE, Memory, code_address
from emufuzz.case.paths import PATHS
from emufuzz.fuzz.config import CampaignConfig
from emufuzz.fuzz.engines import make_kvm_subject, make_oracle, make_subject
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.kvm.generate import generator_of
from emufuzz.fuzz.kvm.recipes import FORCED
from emufuzz.fuzz.libfuzzer.mutators import Mutators
from emufuzz.fuzz.libfuzzer.target import Target, fitted, scope_of
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.fuzz.mutate import Scope
from emufuzz.subject.flat import FlatSubject

LONGEST = 8192
EMULATOR = CampaignConfig().setup()
KVM = CampaignConfig(subject="kvm", paths=PATHS).setup()


def flipped(data, longest):
    """Stands for libFuzzer's own mutation."""
    rng = Random(data)
    changed = bytearray(data or b"\0")
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed[:longest])


def encoded(setup, count):
    return [encode_case(case) for case in generator_of(setup.seed, 0, setup.options).cases(count)]


@pytest.fixture(scope="module")
def mutators():
    return Mutators(scope_of(EMULATOR), flipped)


def instruction_of(case):
    """The instruction alone, in flat memory: without its path, and without the prefix of forced emulation."""
    code = case.code.removeprefix(FORCED)
    page = code_address(case) & ~PAGE_MASK
    memory = Memory(((page, b""), (page + PAGE_SIZE & (1 << 64) - 1, b"")))
    return msgspec.structs.replace(case, code=code, path=None, extra=None, count=1, mem=memory)


def share_decodable(cases):
    outcomes = FlatSubject(events=False).run([instruction_of(case) for case in cases])
    decodable = [outcome.decode_rc == "ok" or outcome.rc == "propagate_fault" for outcome in outcomes]
    return sum(decodable) / len(decodable)


@pytest.mark.parametrize("setup", [EMULATOR, KVM], ids=["emulator", "kvm"])
def test_nine_in_ten_mutants_decode(setup):
    corpus, rng, scope = encoded(setup, 200), Random(1), scope_of(setup)
    mutators = Mutators(scope, flipped)
    mutants = [mutators.mutate(rng.choice(corpus), LONGEST, seed) for seed in range(600)]
    assert share_decodable([fitted(decode_case(data), scope) for data in mutants]) >= 0.9
    assert len(set(mutants)) > 0.95 * len(mutants)


@pytest.mark.parametrize("setup", [EMULATOR, KVM], ids=["emulator", "kvm"])
def test_so_do_mutants_and_crosses_of_mutants(setup):
    corpus, rng, scope = encoded(setup, 100), Random(5), scope_of(setup)
    mutators = Mutators(scope, flipped)
    for seed in range(1000):  # each case is replaced by offspring ten times
        one, other = rng.choice(corpus), rng.choice(corpus)
        mutant = mutators.crossover(one, other, LONGEST, seed) if seed % 5 == 0 else b""
        corpus[rng.randrange(len(corpus))] = mutant or mutators.mutate(one, LONGEST, seed)
    assert share_decodable([fitted(decode_case(data), scope) for data in corpus]) >= 0.9


def test_mutants_of_exit_paths_are_cases_of_exit_paths():
    corpus, rng, scope = encoded(KVM, 60), Random(2), scope_of(KVM)
    mutators, subject = Mutators(scope, flipped), make_kvm_subject()
    mutants = [mutators.mutate(rng.choice(corpus), LONGEST, seed) for seed in range(80)]
    cases = [fitted(decode_case(data), scope) for data in mutants]
    assert {case.path for case in cases} <= set(PATHS)
    for case in cases:
        assert case_from_json(case_to_json(case)) == case
    assert not [outcome.crash for outcome in subject.run(cases) if outcome.crash]


def test_the_same_arguments_give_the_same_mutant(mutators):
    one, other = encoded(EMULATOR, 2)
    assert mutators.mutate(one, LONGEST, 7) == mutators.mutate(one, LONGEST, 7)
    assert mutators.crossover(one, other, LONGEST, 7) == mutators.crossover(one, other, LONGEST, 7)
    assert mutators.mutate(one, LONGEST, 7) != mutators.mutate(one, LONGEST, 8)


def test_a_cross_has_something_of_both(mutators):
    one, other = encoded(EMULATOR, 2)
    a, b = decode_case(one), decode_case(other)
    crosses = [decode_case(mutators.crossover(one, other, LONGEST, seed)) for seed in range(40)]
    assert any(set(case.gpr) & set(b.gpr) - set(a.gpr) and set(case.gpr) & set(a.gpr) for case in crosses)


@pytest.mark.parametrize("longest", [1, 20, 100])
def test_nothing_is_longer_than_allowed(mutators, longest):
    corpus = encoded(EMULATOR, 20)
    for seed in range(40):
        assert len(mutators.mutate(corpus[seed % 20], longest, seed)) <= longest
        assert len(mutators.crossover(corpus[seed % 20], corpus[seed % 7], longest, seed)) <= longest


def test_any_bytes_can_be_mutated(mutators):
    rng = Random(3)
    for seed in range(60):
        data, other = rng.randbytes(rng.randrange(80)), rng.randbytes(rng.randrange(80))
        assert mutators.mutate(data, LONGEST, seed)
        mutators.crossover(data, other, LONGEST, seed)


def test_a_campaign_takes_any_case_and_accounts_for_it():
    target = Target(
        CampaignLoop(make_subject(), make_oracle()), Scope(tuple(mode for mode in MODES if mode != "vm86"))
    )
    target.begin(3)
    rng = Random(4)
    kvm = encoded(KVM, 30)
    inputs = [rng.randbytes(rng.randrange(60)) for _ in range(60)] + kvm + encoded(EMULATOR, 60)
    for index, data in enumerate(inputs):
        target.run(target.decoded(data), index)
    result = target.result
    counted = result.agreed + sum(result.skipped.values()) + sum(result.bucket_cases.values())
    assert result.cases == counted == len(inputs)
    assert sum(tally.cases for tally in result.cells.values()) == len(inputs)
    assert any(reason.startswith("mode: ") for reason in result.skipped)
    assert result.agreed > 20


def test_cases_are_brought_into_scope():
    case = decode_case(encoded(KVM, 1)[0])
    alone = fitted(case, Scope(MODES))
    assert (alone.path, alone.extra) == (None, None)
    plain = generate_batch(1, 0, 1)[0]
    assert fitted(plain, Scope(MODES, ("fep", "skip"))).path in ("fep", "skip")
    assert fitted(plain, Scope(MODES)) == plain


def test_states_do_not_contradict_themselves():
    case = decode_case(encoded(KVM, 1)[0])
    apic = msgspec.structs.replace(
        case, path="exit", extra={"kvm": {"knobs": {"irqchip": True}, "lapic": {0x80: 0x53}}}
    )
    assert fitted(apic, scope_of(KVM)).system.cr8 == 5
    high = msgspec.structs.replace(generate_batch(1, 0, 1)[0], mode="compat32", rip=1 << 63 | 0x6000)
    assert fitted(high, scope_of(EMULATOR)).rip == 0x6000
    wide = msgspec.structs.replace(high, gpr=(1 << 63 | 5,) * 16, rip=0x6000)
    assert fitted(wide, scope_of(EMULATOR)).gpr == (5,) * 16
    assert fitted(msgspec.structs.replace(high, mode="prot64"), scope_of(EMULATOR)).rip == 1 << 63 | 0x6000
