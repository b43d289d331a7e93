"""The ledgers of all oracles together: every gap is proven by a test, and says what it is about."""

from __future__ import annotations

from importlib import import_module

import pytest

from emufuzz.oracle.bochs.gaps import BOCHS_GAPS
from emufuzz.oracle.native.gaps import native_gaps
from emufuzz.oracle.native.host import Host
from emufuzz.oracle.registry import ORACLES, attached_gaps, gap_reasons
from emufuzz.oracle.unicorn import UnicornOracle
from emufuzz.oracle.unicorn.ledger import LEDGER
from tests.unit.oracle import (
    test_unicorn_control_gaps,
    test_unicorn_corner_gaps,
    test_unicorn_gaps,
    test_unicorn_machine_gaps,
    test_unicorn_vm86_gaps,
)
from tests.unit.oracle.bochs import test_bochs_gaps
from tests.unit.oracle.native import test_native_gaps, test_unicorn_host_gaps

HERE = "tests.unit.oracle"
GAPS = (*LEDGER, *BOCHS_GAPS, *native_gaps(Host("amd", 0, 0, 0, "", frozenset())))

#: Gaps that only a run shows, and those of neighbours: id -> the test that meets it.
TESTS = {
    "unicorn-breakpoints": "test_unicorn_gaps.test_a_move_to_a_debug_register_is_not_run",
    "unicorn-code-in-device": "test_unicorn_devices.test_code_in_a_device_is_not_judged",
    "unicorn-code-page-write": "test_unicorn_physical.test_a_write_to_the_code_is_not_judged",
    "unicorn-code-wrap": "test_unicorn_oracle.test_code_over_the_end_of_linear_memory_is_not_run",
    "unicorn-device-page-split":
        "test_unicorn_physical.test_an_implicit_access_over_the_end_of_a_device_page_is_not_judged",
    "unicorn-engine-error": "test_ledgers.test_an_error_of_the_engine_is_not_an_exception",
    "unicorn-int-delivery": "test_unicorn_gaps.test_software_interrupts_are_not_delivered",
    "unicorn-lock-bit-register": "test_unicorn_gaps.test_lock_on_a_bit_register_is_never_run",
    "unicorn-pkru": "test_unicorn_physical.test_protection_keys_are_not_judged",
    "unicorn-undefined-before": "test_unicorn_several.test_undefined_flags_are_followed",
    "native-system-call": "native.test_native_gaps.test_system_calls_are_a_gap_of_their_own",
    "native-other-code": "native.test_native_gaps.test_absent_pages_near_the_code_of_others",
    "bochs-no-memory": "bochs.test_bochs_gaps.test_physical_memory_that_is_not_there",
    "bochs-hidden-rights":
        "bochs.test_bochs_gaps.test_levels_that_do_not_fit_are_refused_by_hidden_tables",
    "exits-fault": "exits.test_real.test_what_ends_on_the_way_is_left_open",
    "exits-open": "exits.test_task.test_what_waits_beside_the_switch_is_left_open",
    "exits-undefined": "exits.test_task.test_what_the_sdm_leaves_undefined_is_not_vouched_for",
    "rules-undetermined": "rules.test_oracle.test_nothing_is_said_of_what_completes",
}  # fmt: skip


def proven() -> set[str]:
    """Gaps that are in a table of proofs, each row of which is a test."""
    rows = (*test_unicorn_gaps.PROOFS, *test_unicorn_host_gaps.PROOFS)
    control = {f"unicorn-{proof[0]}" for proof in test_unicorn_control_gaps.PROOFS}
    named = (
        *test_unicorn_corner_gaps.PROOFS,
        *test_unicorn_machine_gaps.PROOFS,
        *test_unicorn_vm86_gaps.PROOFS,
    )
    return (
        {f"unicorn-{proof.gap}" for proof in rows}
        | control
        | {f"unicorn-{name.partition(',')[0]}" for name in named}
        | {f"native-{proof.gap}" for proof in test_native_gaps.PROOFS}
        | test_bochs_gaps.PROOFS.keys()
    )


def test_every_gap_of_every_oracle_has_a_proof():
    assert gap_reasons().keys() == proven() | TESTS.keys()


def test_no_gap_has_a_proof_that_is_none():
    for gap_id, name in TESTS.items():
        module, _, test = name.rpartition(".")
        assert callable(getattr(import_module(f"{HERE}.{module}"), test)), gap_id


def test_ids_are_unique_and_begin_with_the_oracle():
    ids = [gap.id for gap in GAPS]
    assert len(set(ids)) == len(ids)
    assert all(gap.id.startswith(gap.oracle + "-") for gap in GAPS)
    assert {gap.oracle for gap in GAPS} <= ORACLES.keys()


@pytest.mark.parametrize("gap", GAPS, ids=lambda gap: gap.id)
def test_an_entry_is_complete(gap):
    assert gap.fields
    assert gap.versions
    assert gap.reference
    assert len(gap.reason) > 10


def test_what_is_attached_has_a_reason():
    known = gap_reasons()
    for name in ORACLES:
        assert all(known[gap] == reason for gap, reason in attached_gaps(name).items())


def test_an_error_of_the_engine_is_not_an_exception(monkeypatch, case):
    """Unicorn has met none; whatever makes it give up is no statement about the instruction."""
    oracle = UnicornOracle()
    monkeypatch.setattr(oracle, "_start", lambda *_: 99)
    outcome = oracle.run([case("prot32", "90")])[0]
    assert (outcome.exception, outcome.unchecked) == (None, (("all", "unicorn-engine-error"),))
    oracle.close()
