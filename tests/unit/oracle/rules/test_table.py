"""The table of rules as a whole: nothing untested, nothing without a citation, nothing twice."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from iced_x86 import Mnemonic

from emufuzz.oracle.rules import RULES
from emufuzz.oracle.rules.decoded import decoded
from emufuzz.oracle.rules.rule import ANY, COMPLETED, EVENTS, FAULT, FAULTED, UNCAUSED
from emufuzz.oracle.rules.table import BY_ID, SUBJECTS, rules_for
from emufuzz.oracle.rules.view import View
from tests.unit.oracle.rules import samples_decode, samples_state, samples_values, samples_ways

SAMPLES = (*samples_decode.SAMPLES, *samples_values.SAMPLES, *samples_state.SAMPLES, *samples_ways.SAMPLES)
CITATION = re.compile(
    r"SDM Vol\. [123][A-D]? (Table )?[A-Z0-9][A-Za-z0-9.\-]*( [A-Z][A-Za-z]*n?)?(, #[A-Z]{2})?"
)


def test_every_rule_has_one_sample():
    assert Counter(sample.rule for sample in SAMPLES) == Counter(rule.id for rule in RULES)


def test_ids_are_unique_and_plain():
    assert len(BY_ID) == len(RULES) == sum(len(rules) for rules in SUBJECTS.values())
    assert [rule.id for rule in RULES if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", rule.id)] == []


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.id)
def test_a_rule_is_well_formed(rule):
    assert CITATION.fullmatch(rule.citation)
    assert 10 < len(rule.demand) < 100
    assert rule.demand[-1] not in ".:"
    assert rule.kind in {FAULT, COMPLETED, FAULTED, EVENTS, ANY, UNCAUSED}
    assert (rule.due is not None) == (rule.kind == FAULT) == (rule.finds is None)
    assert rule.mnemonics is None or all(number in Mnemonic.__dict__.values() for number in rule.mnemonics)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample.rule)
def test_a_sample_is_of_the_rule(sample):
    rule = BY_ID[sample.rule]
    if rule.kind != FAULT or sample.good.exception is not None:
        assert rule.selects(View(sample.case).insn)


def test_encodings_of_one_shape_share_their_rules():
    first, second = decoded(bytes.fromhex("8b03"), 64), decoded(bytes.fromhex("8b4e10"), 64)
    assert first.shape == second.shape
    assert rules_for(first) is rules_for(second)
    assert decoded(bytes.fromhex("f6f3"), 64).shape != decoded(bytes.fromhex("f6e3"), 64).shape
