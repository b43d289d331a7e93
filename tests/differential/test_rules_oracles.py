"""The rules against Unicorn, Bochs, this processor and recorded KVM: every contradiction has a name."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
from support.oracle_pairs import cases_for
from support.random_cases import RandomCases

from emufuzz.case.catalogue import catalogue
from emufuzz.case.delta import expect_to_outcome
from emufuzz.case.vectors import read_vectors
from emufuzz.fuzz.generate import generate_batch
from emufuzz.oracle.base import Oracle, OracleUnavailableError
from emufuzz.oracle.bochs import BochsOracle
from emufuzz.oracle.native import NativeOracle
from emufuzz.oracle.reasons import covers
from emufuzz.oracle.rules import RULES, RulesOracle
from emufuzz.oracle.rules.review import review
from emufuzz.oracle.rules.rule import FAULT
from emufuzz.oracle.rules.table import rules_for
from emufuzz.oracle.rules.view import View
from emufuzz.oracle.unicorn import UnicornOracle

ROOT = Path(__file__).parents[2]
SPEC = spec_from_file_location("generate_oracle_rules", ROOT / "docs" / "generate_oracle_rules.py")
page = module_from_spec(SPEC)
SPEC.loader.exec_module(page)

VECTORS = ROOT / "tests" / "data" / "vectors" / "kvm-6.12.jsonl.zst"
BATCH = 1000

#: Rules that no recorded, generated or catalogue case is about: their instructions are not implemented by
#: the emulator under test, or their states not generated. Samples of tests/unit/oracle/rules are about them.
UNREACHED = frozenset(("gp-cpl-invpcid", "gp-lldt-canonical"))


@pytest.fixture(scope="module")
def unicorn() -> Iterator[UnicornOracle]:
    opened = UnicornOracle()
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def native() -> Iterator[NativeOracle]:
    try:
        opened = NativeOracle()
    except OracleUnavailableError as error:
        pytest.skip(str(error))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def bochs() -> Iterator[BochsOracle]:
    try:
        opened = BochsOracle()
    except OracleUnavailableError as error:
        if "missing" not in str(error):
            raise
        pytest.skip(str(error))
    yield opened
    opened.close()


def _uncovered(oracle: Oracle, seed: int, count: int) -> list[str]:
    """Rules that an oracle's outcomes break beyond its ledger, and the cases."""
    rules, places, judged = RulesOracle(), [], 0
    for cases in cases_for((oracle,), seed, count):
        for case, outcome in zip(cases, oracle.run(cases), strict=True):
            judged += 1
            broken = rules.review(case, outcome)
            unchecked = oracle.unchecked(case, outcome) if broken else ()
            places += [
                f"{case.id} {case.mode} {case.code.hex()}: {violation}"
                for violation in broken
                if not any(covers(field, violation.field) for field, _ in unchecked)
            ]
    assert judged == count
    return places


@pytest.mark.parametrize(("name", "seed"), [("unicorn", 9), ("native", 13), ("bochs", 15)])
def test_oracles_break_rules_only_where_their_ledgers_say_so(name, seed, request):
    assert _uncovered(request.getfixturevalue(name), seed, 8000) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 210))
@pytest.mark.parametrize("name", ["unicorn", "native", "bochs"])
def test_oracles_break_rules_only_where_their_ledgers_say_so_on_200000_cases(name, seed, request):
    assert _uncovered(request.getfixturevalue(name), seed, 20_000) == []


@pytest.fixture(scope="module")
def recorded():
    """Rule -> code -> violations of recorded outcomes; and the rules that are about any recorded case."""
    broken: dict[str, Counter[str]] = defaultdict(Counter)
    about: set[str] = set()
    for case, expect in read_vectors(VECTORS):
        outcome = expect_to_outcome(case, expect)
        for violation in review(case, outcome):
            broken[violation.rule][case.code.hex()] += 1
        about |= _about(case)
    return broken, about


def _about(case) -> set[str]:
    """Rules that demand something of a case, or of its outcome."""
    view = View(case)
    selected = rules_for(view.insn)
    faults = (*selected.early, *selected.access, *selected.late)
    due = {rule.id for rule in faults if rule.demanded(view) is not None}
    return due | {rule.id for part in selected[3:] for rule in part}


def test_recorded_kvm_breaks_rules_only_where_it_is_known_to(recorded):
    broken, _ = recorded
    found = {rule: sum(cases.values()) for rule, cases in broken.items()}
    assert found == {rule: count for rule, (_, count, _, _) in page.KVM.items()}


def test_every_rule_is_about_some_case(recorded):
    _, about = recorded
    for number in range(4):
        for case in generate_batch(11, number, BATCH):
            about |= _about(case)
    states = RandomCases(12)
    for case in (*catalogue().values(), *(states.case() for _ in range(8000))):
        about |= _about(case)
    assert {rule.id for rule in RULES} - about == UNREACHED


def test_faults_that_are_due_are_as_often_recorded(recorded):
    broken, about = recorded
    demanding = {rule.id for rule in RULES if rule.kind == FAULT} & about
    assert len(demanding) > 80
    assert len(demanding & set(broken)) < len(demanding) // 4


def test_the_page_is_up_to_date():
    assert page.TARGET.read_text(encoding="utf-8") == page.document()
    assert set(page.KVM) <= {rule.id for rule in RULES}
