"""Does the fuzzer find seeded bugs? One broken handler per family, each with its own budget."""

from __future__ import annotations

import pytest

from emufuzz.arch.leaves import LEAVES
from emufuzz.emulator.opcode import leaves
from emufuzz.emulator.tables import ONE_BYTE, THREE_BYTE, TWO_BYTE
from emufuzz.fuzz.bugs import BUGS, seeded_bug
from emufuzz.fuzz.generate import generate_batch
from emufuzz.fuzz.loop import CampaignLoop
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

BATCH = 2048
#: Cases within which a campaign must report a broken handler.
BUDGET = 200_000
#: Budget of the default run; the rarest instructions get the whole one.
QUICK = 30_000
RARE = {"das-af", "cmc-set", "leave-rsp"}


@pytest.fixture(scope="module")
def loop():
    return CampaignLoop(FlatSubject(events=False), UnicornOracle())


def handlers():
    return [opcode.execute for table in (ONE_BYTE, TWO_BYTE, THREE_BYTE) for opcode in leaves(table)]


def cases_until_found(loop, bug, budget, seed):
    """Cases run until a finding of a broken leaf; 0 if there is none."""
    broken = {row.leaf for row in LEAVES.values() if row.mnemonic in BUGS[bug].mnemonics}
    with seeded_bug(bug):
        for number in range(-(-budget // BATCH)):
            result = loop.run_batch(number, generate_batch(seed, number, BATCH))
            if any(bucket.leaf in broken for bucket in result.bucket_cases):
                return (number + 1) * BATCH
    return 0


@pytest.mark.parametrize("bug", sorted(set(BUGS) - RARE))
def test_a_common_handler_broken_is_found_quickly(loop, bug):
    assert cases_until_found(loop, bug, QUICK, seed=3)


@pytest.mark.parametrize("bug", sorted(RARE))
def test_a_rare_handler_broken_is_found_within_the_budget(loop, bug):
    assert cases_until_found(loop, bug, BUDGET, seed=3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("bug", sorted(BUGS))
def test_every_handler_broken_is_found_within_the_budget(loop, bug, seed):
    assert cases_until_found(loop, bug, BUDGET, seed)


def test_there_is_a_bug_per_family():
    families = {bug.family for bug in BUGS.values()}
    assert len(families) == len(BUGS) >= 10


@pytest.mark.parametrize("bug", sorted(BUGS))
def test_handlers_are_whole_again_afterwards(bug):
    before = handlers()
    with seeded_bug(bug):
        changed = sum(a is not b for a, b in zip(before, handlers(), strict=True))
    assert changed
    assert handlers() == before


def test_without_a_bug_nothing_is_broken(loop):
    with seeded_bug(""):
        results = [loop.run_batch(number, generate_batch(3, number, BATCH)) for number in range(8)]
    assert not [bucket for result in results for bucket in result.bucket_cases]


def test_an_unknown_bug_is_an_error():
    with pytest.raises(KeyError), seeded_bug("no-such-bug"):
        pass
