from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from support.handler_cases import DR7, EXAMPLES, RIP, debug_registers, exit_case

from emufuzz.arch.rflags import X86_EFLAGS_RF, X86_EFLAGS_TF
from emufuzz.case.json import case_from_json, case_to_json
from emufuzz.case.model import case_pages, code_address
from emufuzz.fuzz.handlers.differential import Totals, judge, judge_runs, run
from emufuzz.fuzz.handlers.generate import KINDS, generate
from emufuzz.fuzz.handlers.observe import (
    PREFIX,
    differing,
    observe_exit,
    run_emulator,
    run_handler,
    with_prefix,
)
from emufuzz.fuzz.handlers.rules import RULES
from emufuzz.subject.kvm import KvmSubject
from emufuzz.subject.kvm.instruction_exits import NoExitError

#: What no instruction here touches through a rule that replaces the whole prediction.
FOREIGN = ("rbp", "r15", "dr3", "cr2", "xcr0", "seg.gs", "gdtr", "efer")


# -- the rules -----------------------------------------------------------------------------------


def test_every_rule_has_an_example():
    assert set(EXAMPLES) == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_rule_explains_its_example(name):
    verdict = judge(EXAMPLES[name])
    assert name in verdict.rules
    assert not verdict.equal
    assert verdict.unexplained == ()


@pytest.mark.parametrize("name", EXAMPLES)
def test_without_its_rule_an_example_is_unexplained(name, monkeypatch):
    module = "emufuzz.fuzz.handlers.rules"
    for group in ("STOPPING", "INSTRUCTIONS", "ENDINGS"):
        rules = getattr(__import__(module, fromlist=[group]), group)
        monkeypatch.setattr(f"{module}.{group}", tuple(rule for rule in rules if rule.name != name))
    assert judge(EXAMPLES[name]).unexplained


def _other(value: Any) -> Any:
    """A value of the same kind that no run ends with."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value ^ 0x40000000
    if isinstance(value, list):
        return [*value, {"reason": "tampered"}]
    if isinstance(value, frozenset):
        return value ^ {"tampered"}
    return "tampered"


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tampered_emulator_is_not_excused(name):
    case = EXAMPLES[name]
    handler, emulator = run_handler(case), run_emulator(case)
    for field, value in emulator.fields.items():
        tampered = copy.copy(emulator)
        tampered.fields = {**emulator.fields, field: _other(value)}
        assert field in judge_runs(case, handler, tampered).unexplained


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_tampered_handler_is_not_excused(name):
    case = EXAMPLES[name]
    handler, emulator = run_handler(case), run_emulator(case)
    for field in FOREIGN:
        tampered = copy.copy(handler)
        tampered.fields = {**handler.fields, field: _other(handler.fields[field])}
        assert judge_runs(case, tampered, emulator).unexplained, field


def test_an_emulator_that_does_what_the_handler_does_is_not_what_a_rule_foretells():
    case = EXAMPLES["hlt-request"]
    handler = run_handler(case)
    assert "halt_request" in judge_runs(case, handler, handler).unexplained


def test_the_documentation_names_every_rule_and_no_other():
    text = (Path(__file__).parents[3] / "docs" / "kvm-handlers.md").read_text("utf-8")
    assert re.findall(r"^\| `([a-z0-9-]+)`", text, re.MULTILINE) == [rule.name for rule in RULES]


# -- one case both ways --------------------------------------------------------------------------


def test_the_instruction_is_at_the_same_address_both_ways():
    case = EXAMPLES["out-step"]
    prefixed = with_prefix(case)
    assert (case.path, prefixed.path) == ("exit", "fep")
    assert prefixed.rip == RIP - len(PREFIX)
    assert case_pages(prefixed) == case_pages(case)


@pytest.mark.parametrize(
    ("code", "kwargs"),
    [
        ("0fa2", {"rax": 0xFFFFFFFF_00000000}),
        ("0f22c0", {"rax": 0xC0010033}),
        ("0f01f0", {"rax": 0x9}),
        ("0f32", {"rcx": 0xC0000080}),
        ("e460", {"rax": 0x1234_5678_9ABC_DEF0}),
        ("e560", {"rax": 0x1234_5678_9ABC_DEF0}),
        ("0f01d1", {"rax": 3, "system": {"cr4": 0x40620}}),
        ("f390", {}),
        ("0f08", {"flags": X86_EFLAGS_TF}),
    ],
)
def test_most_instructions_end_alike(code, kwargs):
    verdict = judge(exit_case(code, **kwargs))
    assert (verdict.equal, verdict.rules, verdict.unexplained) == (True, (), ())


def test_a_case_without_exit_is_not_compared():
    case = exit_case("90")
    assert judge(case).no_exit == "the instruction does not exit"
    with pytest.raises(NoExitError):
        run_handler(case)


def test_the_state_at_the_exit_is_that_of_the_case_with_rf_saved_as_0():
    case = EXAMPLES["rf-after-fault"]
    fields = observe_exit(case, run_handler(case)).fields
    assert (fields["rip"], fields["rflags"], fields["rcx"]) == (RIP, 2, 0x12345)
    assert fields["requests"] == frozenset()


def test_differing_names_fields():
    fields = run_handler(EXAMPLES["hlt-request"]).fields
    assert differing(fields, {**fields, "rax": 1, "cr8": 2}) == ["rax", "cr8"]


def test_a_breakpoint_before_a_write_that_the_fastpath_does_not_filter():
    dr7 = DR7 | 1
    case = exit_case(
        "0f30", rcx=0x6E0, flags=X86_EFLAGS_RF, system=debug_registers(dr7, RIP),
        knobs={"msr_denied": "0x6e0", "force_emulation_prefix": 3},
    )  # fmt: skip
    verdict = judge(case)
    assert verdict.unexplained == ()
    assert "code-breakpoint" in verdict.rules


def test_a_fastpath_that_differs_from_its_handler_is_found(monkeypatch):
    monkeypatch.setattr(
        "emufuzz.kvm.exit_fastpath.kvm_emulate_halt", lambda machine: machine.vcpu.run.leave("INTR") or 0
    )
    found = judge(EXAMPLES["hlt-request"]).unexplained
    assert "fastpath.exits" in found


# -- generated cases -----------------------------------------------------------------------------


def test_generated_cases_depend_on_seed_and_number_only():
    assert generate(5, 77) == generate(5, 77)
    assert generate(5, 77) != generate(6, 77)
    assert generate(5, 77) != generate(5, 78)


def test_generated_cases_are_cases_and_have_the_prefix_before_them():
    subject = KvmSubject()
    for number in range(300):
        _, case = generate(1, number)
        again = case_from_json(case_to_json(case))
        subject.check(again)
        assert (again.gpr, again.system, again.code) == (case.gpr, case.system, case.code)
        if "phys" not in (case.extra or {}):
            before = code_address(case) - len(PREFIX)
            page = case_pages(case)[before >> 12]
            assert page[before & 0xFFF :][: len(PREFIX)] == PREFIX


def test_every_kind_of_instruction_is_generated_and_all_but_clts_exit():
    seen = {generate(2, number)[0] for number in range(1500)}
    assert seen == set(KINDS)
    assert set(run(2, range(1500)).kinds) == set(KINDS) - {"clts"}


def test_totals_add_up_and_tell_all_rules():
    totals = run(3, range(200))
    assert totals.cases == 200 == totals.compared + sum(totals.skipped.values())
    assert sum(totals.kinds.values()) == totals.compared
    assert totals.fastpath > 0
    text = "\n".join(totals.lines())
    assert all(rule.name in text and rule.why in text for rule in RULES)
    assert Totals().compared == 0
