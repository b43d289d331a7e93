"""Unicorn with devices, and with page tables, against what the port does with flat memory.

The same instructions of the fuzzer run three times: by the port on the case as it is; by Unicorn
with all data in devices, which must be asked for what the port read and wrote, in that order; and
by Unicorn with the pages scattered behind tables, which must end in the same state.
"""

from __future__ import annotations

import random
from collections import Counter

import pytest
from support.moved_cases import (
    expect_devices,
    expect_tables,
    has_paging,
    with_devices,
    with_tables,
    without_tables,
)

from emufuzz.fuzz.generate import Options, generate_batch
from emufuzz.oracle.compare import AGREE, FINDING, SKIPPED, judge, refusal
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.subject.flat import FlatSubject

#: KVM reads the operand of LGDT and LIDT once more than it needs.
READ_TWICE = {"0f01/2.mem", "0f01/3.mem"}


@pytest.fixture(scope="module")
def oracle():
    opened = UnicornOracle()
    yield opened
    opened.close()


def _cases(seed, count):
    batch, cases = 0, []
    while len(cases) < count:
        cases += generate_batch(seed, batch, 512, Options(states=1))
        batch += 1
    return cases[:count]


def _note(seen, case, ours, theirs, oracle):
    verdict = judge(case, ours, theirs, oracle)
    if verdict.kind == FINDING and ours.leaf in READ_TWICE:
        fields = {difference.field for difference in verdict.differences}
        assert fields == {"device_trace"}, (case.code.hex(), verdict.differences)
        seen["read twice"] += 1
        return
    assert verdict.kind != FINDING, (case.mode, case.code.hex(), verdict.differences)
    seen[verdict.kind] += 1
    seen["faults"] += ours.exception is not None


def _run_devices(oracle, seed, count):
    subject, seen = FlatSubject(events=True), Counter()
    for case in _cases(seed, count):
        moved_case, moved = with_devices(case)
        (ours,) = subject.run([case])
        if refusal(ours):
            continue
        ours.gpr = tuple(ours.gpr)
        (theirs,) = oracle.run([moved_case])
        seen["accesses"] += len(theirs.extra["device_trace"]) if theirs.extra else 0
        _note(seen, moved_case, expect_devices(case, ours, moved), theirs, oracle)
    return seen


def _run_tables(oracle, seed, count):
    subject, seen, rng = FlatSubject(), Counter(), random.Random(seed)
    for flat in filter(has_paging, _cases(seed, count)):
        case, moved_case, frames = with_tables(flat, rng)
        (ours,) = subject.run([case])
        if refusal(ours):
            continue
        ours.gpr = tuple(ours.gpr)
        (theirs,) = oracle.run([moved_case])
        _note(seen, moved_case, expect_tables(ours, frames), without_tables(theirs), oracle)
    return seen


def _assert_compared(seen, at_least):
    compared = seen[AGREE] + seen[SKIPPED]
    assert compared > at_least
    assert seen[AGREE] > compared * 0.85
    assert seen["faults"] > compared * 0.05


def test_devices_are_asked_what_the_port_asks_memory(oracle):
    seen = _run_devices(oracle, seed=11, count=4000)
    _assert_compared(seen, 3000)
    assert seen["accesses"] > 1500


def test_cases_behind_page_tables_end_alike(oracle):
    _assert_compared(_run_tables(oracle, seed=12, count=4000), 2000)


@pytest.mark.slow
def test_devices_are_asked_what_the_port_asks_memory_100000(oracle):
    _assert_compared(_run_devices(oracle, seed=13, count=100_000), 75_000)


@pytest.mark.slow
def test_cases_behind_page_tables_end_alike_100000(oracle):
    _assert_compared(_run_tables(oracle, seed=14, count=100_000), 50_000)
